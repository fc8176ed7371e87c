"""Every collective of this rank, compared with the other ranks' before it is made: where ranks differ, each of them
raises Diverged at once, instead of waiting for the others without end.

Recorded where torch's dispatcher hands a collective to its process group, so that those of DeepSpeed, accelerate,
transformers and DDP's C++ are among them. Ranks meet in a file that all of them map.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

SLOT, SLOTS = 512, 2  # bytes of an entry; a rank is at most one entry ahead of the others
PATIENCE = 30.0  # seconds in which the other ranks have to come


class Diverged(AssertionError):
    """The ranks' next steps are not the same."""


class Board:
    """What each rank is about to do: `meet` compares it."""

    def __init__(self, path: str):
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.of_rank = 8 + SLOTS * SLOT
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(handle, self.ranks * self.of_rank)
        self.memory = mmap.mmap(handle, self.ranks * self.of_rank)
        os.close(handle)
        self.met = 0
        self.diverged: Diverged | None = None

    def meet(self, entry: str) -> None:
        """Raises Diverged on every rank unless all of them come with the same entry."""
        text = entry.encode()[: SLOT - 1].ljust(SLOT, b"\0")
        start = self.rank * self.of_rank
        slot = 8 + (self.met % SLOTS) * SLOT
        self.memory[start + slot : start + slot + SLOT] = text
        self.met += 1
        struct.pack_into("q", self.memory, start, self.met)
        for other in set(range(self.ranks)) - {self.rank}:
            start = other * self.of_rank
            waiting = time.monotonic()
            while struct.unpack_from("q", self.memory, start)[0] < self.met:
                time.sleep(2e-5)
                if time.monotonic() - waiting > PATIENCE:
                    self._diverge(f"rank {other} did not come to {entry}")
            theirs = self.memory[start + slot : start + slot + SLOT]
            if theirs != text:
                theirs = theirs.rstrip(b"\0").decode(errors="replace")
                self._diverge(f"rank {self.rank} is at {entry}, rank {other} at {theirs}")

    def _diverge(self, text: str) -> None:
        self.diverged = Diverged(f"step {self.met}: {text}")
        raise self.diverged


class CollectiveRecorder:
    """The collectives made while `recording`: (operation, group, shapes and dtypes)."""

    def __init__(self, board: Board):
        self.board = board
        self.seen: list[str] = []

    def note(self, operation: str, args: tuple[Any, ...]) -> None:
        entry = f"{operation} {' '.join(_described(args))}"
        self.seen.append(entry)
        self.board.meet(entry)


def _described(args: tuple[Any, ...]) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield f"{tuple(arg.shape)}{arg.dtype}"
        elif isinstance(arg, (list, tuple)):
            yield from _described(tuple(arg))
        elif isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            group = distributed.ProcessGroup.unbox(arg)
            yield f"{group.group_name}/{group.size()}"


@contextmanager
def recording(board: Board) -> Iterator[CollectiveRecorder]:
    """Inside, all collectives are compared; at the end also that all ranks end here, in the same way."""
    recorder = CollectiveRecorder(board)
    library = torch.library.Library("c10d", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operation = name.partition("::")
        if namespace == "c10d" and (operation.endswith("_") or operation in ("barrier", "send")):
            library.impl(operation, _noting(recorder, operation), "AutogradCPU")
    try:
        yield recorder
    except BaseException as error:
        if board.diverged is not None:  # what came of it does not matter
            raise board.diverged from error
        board.meet(f"an end with {type(error).__name__}")
        raise
    else:
        board.meet("the end")
    finally:
        library._destroy()


def _noting(recorder: CollectiveRecorder, operation: str) -> Any:
    call = getattr(torch.ops.c10d, operation).default

    def noting(*args: Any) -> Any:
        recorder.note(operation, args)
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)

    return noting
