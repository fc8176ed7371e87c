"""Rank, world size and collectives. Collectives are called by all ranks; without a process group, world size is 1."""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm import tqdm


def started() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    return distributed.get_rank() if started() else 0


def world_size() -> int:
    return distributed.get_world_size() if started() else 1


def store() -> distributed.Store:
    """The rendezvous store; only with a process group."""
    return distributed.distributed_c10d._get_default_store()


def tell(text: str) -> None:
    """Print a line on rank 0, above progress bars; before the process group exists, the launcher's RANK decides. Not
    collective."""
    if (rank() if started() else int(os.environ.get("RANK", "0"))) == 0:
        tqdm.write(f"sdft_ds: {text}")
        sys.stdout.flush()


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """All-gather a picklable value from every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def from_rank_0(work: Callable[[], Any], meanwhile: Iterable[Any] = ()) -> Any:
    """Run `work` on rank 0 alone; its result, or its exception, is every rank's.

    meanwhile: an iterator with collectives in it, which `work` may consume; every rank iterates it to its end, also
    after an exception in `work`.
    """
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    for _ in meanwhile:
        pass
    if world_size() > 1:
        known = error if type(error) in (ValueError, RuntimeError) else error and RuntimeError(repr(error))
        outcome = [(result, known)]
        distributed.broadcast_object_list(outcome, src=0)
        result, error = (result, error) if rank() == 0 else outcome[0]
    if error is not None:
        raise error
    return result


def all_reduce(tensor: Tensor, how: str) -> Tensor:
    """All-reduce the tensor in place; how: sum or max."""
    if world_size() > 1:
        distributed.all_reduce(tensor, {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}[how])
    return tensor


def all_reduce_max(value: float, device: torch.device) -> float:
    """The maximum over all ranks."""
    return all_reduce(torch.tensor(float(value), device=device), "max").item()


def pad_to_equal_count(items: list[Any], filler: Any, device: torch.device) -> list[Any]:
    """The items, padded with the filler to the same number on every rank.

    For work that is itself collective: the ranks agree on the number of calls before the first one. A list, not a
    generator, whose reduction would run in the middle of the work.
    """
    return items + [filler] * (int(all_reduce_max(len(items), device)) - len(items))
