"""This process among the others: where it stands, and what they agree on. Every function here is called by all ranks;
with one process, or none started together, it answers for that one."""

from typing import Any

import torch
from torch import Tensor, distributed


def started() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def index() -> int:
    return distributed.get_rank() if started() else 0


def count() -> int:
    return distributed.get_world_size() if started() else 1


def store() -> distributed.Store:
    """What the ranks met in; only where they were started together."""
    return distributed.distributed_c10d._get_default_store()


def barrier() -> None:
    if count() > 1:
        distributed.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank; a value is anything that pickles."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def reduce(tensor: Tensor, how: str) -> Tensor:
    """The tensor joined over the ranks, in place; how: sum or max."""
    if count() > 1:
        distributed.all_reduce(tensor, {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}[how])
    return tensor


def largest(value: float, device: torch.device) -> float:
    """The largest value of any rank."""
    return reduce(torch.tensor(float(value), device=device), "max").item()


def equally_many(items: list[Any], filler: Any, device: torch.device) -> list[Any]:
    """The items, and then the filler as often as it takes to have as many on every rank.

    For work that is a collective itself: the ranks agree on how often to do it before the first of them begins. A
    list, not a generator, whose reduction would run in the middle of the work.
    """
    return items + [filler] * (int(largest(len(items), device)) - len(items))
