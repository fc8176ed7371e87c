"""Shutdown of a multi-rank command: ranks exit together after success, immediately after an error.

Ranks that leave a process group one by one, while others still use it, abort after all work is done; the launcher then
reports a failure, and may kill rank 0 while it is still writing.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from torch import distributed

from sdft_ds.distributed import ranks

DONE, FAILED = "sdft_ds/done", "sdft_ds/failed"
POLL = 0.1  # seconds
NOT_AT_THE_END = "Another rank has failed, or has not come to the end."


class Preempted(SystemExit):
    """Exits the program with the preemption exit code; a checkpoint was saved."""


@contextmanager
def together() -> Iterator[None]:
    """Wraps a complete command. After success or preemption, which all ranks agreed on, ranks wait for each other and
    close the process group. A rank that fails does not wait: it prints the error and exits with its status, or 1."""
    left = None
    try:
        try:
            yield
        except Preempted as error:
            left = error
        close()
    except KeyboardInterrupt:
        about = "Nothing was saved now; a resume continues from the newest checkpoint, if there is one."
        print(f"\nsdft_ds: Interrupted. {about}", file=sys.stderr)
        _fail(SystemExit(130))
    except BaseException as error:
        _fail(error)
    if left is not None:
        raise left


def close() -> None:
    """Wait for all ranks, however long rank 0 writes or uploads, and close the process group.

    Called by every rank. Raises RuntimeError if another one has failed.
    """
    if not ranks.started():
        return
    if ranks.world_size() > 1:
        store = ranks.store()
        with _store_may_be_gone():
            store.add(DONE, 1)
        # A barrier would raise after ddp_timeout. Rank 0 applies that limit: the others have nothing slow left to do.
        patience = distributed.distributed_c10d.default_pg_timeout.total_seconds()
        deadline = time.monotonic() + patience if ranks.rank() == 0 else float("inf")
        while _waits_for_others(store):
            if time.monotonic() > deadline:
                raise RuntimeError(NOT_AT_THE_END)
            time.sleep(POLL)
        ranks.barrier()  # until no rank polls the store any more, which ends with rank 0
    distributed.destroy_process_group()


@contextmanager
def _store_may_be_gone() -> Iterator[None]:
    """Rank 0's process serves the store: without it, it has failed."""
    try:
        yield
    except RuntimeError:
        raise RuntimeError(NOT_AT_THE_END) from None


def _waits_for_others(store: distributed.Store) -> bool:
    """Whether some rank has not come to the end yet. Raises RuntimeError if one has failed."""
    with _store_may_be_gone():
        has_failed, at_the_end = store.check([FAILED]), store.add(DONE, 0)
    if has_failed:
        raise RuntimeError(NOT_AT_THE_END)
    return at_the_end < ranks.world_size()


def _fail(error: BaseException) -> NoReturn:
    """Raise the error if there is one rank. Else print it, notify the others, and end the process here: they may still
    wait inside the process group, and closing it would wait for them."""
    if ranks.world_size() == 1:
        if ranks.started():
            with suppress(RuntimeError):  # after an error on the device nothing works there any more
                distributed.destroy_process_group()
        raise error
    status = 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(error.code, int):
        status = error.code
    else:
        print(error.code, file=sys.stderr)
    with suppress(RuntimeError):  # the store is gone if its rank is
        ranks.store().set(FAILED, str(ranks.rank()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
