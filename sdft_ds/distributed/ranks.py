"""Rank, world size and collectives. Every function is collective; a single process gets its own
value."""

from typing import Any

import torch
from torch import Tensor, distributed


def started() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if started() else 0


def world_size() -> int:
    return distributed.get_world_size() if started() else 1


def store() -> distributed.Store:
    """What the ranks met in; only where they were started together."""
    return distributed.distributed_c10d._get_default_store()


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank; a value is anything that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def all_reduce(tensor: Tensor, how: str) -> Tensor:
    """The tensor joined over the ranks, in place; how: sum or max."""
    if world_size() > 1:
        distributed.all_reduce(tensor, {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}[how])
    return tensor


def all_reduce_max(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    return all_reduce(torch.tensor(float(value), device=device), "max").item()


def pad_to_equal_count(items: list[Any], filler: Any, device: torch.device) -> list[Any]:
    """The items, and then the filler as often as it takes to have as many on every rank.

    For work that is a collective itself: the ranks agree on how often to do it before the first of them begins. A
    list, not a generator, whose reduction would run in the middle of the work.
    """
    return items + [filler] * (int(all_reduce_max(len(items), device)) - len(items))
