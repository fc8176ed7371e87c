"""How a command of several ranks ends: all together after success, at once after an error.

Ranks that leave a process group one by one, each while the others still use it, abort after all work is done; the
launcher then reports a failure, and may kill the first rank while it still writes.
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


class Preempted(SystemExit):
    """Leaves the program with the exit code of preemption; what was trained is saved."""


@contextmanager
def together() -> Iterator[None]:
    """Around all that a command does. After success, and where all ranks agreed to leave, they wait for each other and
    close the process group. A rank that fails waits for nobody: it says why and ends with its status, or with 1."""
    left = None
    try:
        try:
            yield
        except Preempted as error:
            left = error
        close()
    except KeyboardInterrupt:
        print("sdft_ds: Interrupted. A resume continues from the newest checkpoint.", file=sys.stderr)
        _fail(SystemExit(130))
    except BaseException as error:
        _fail(error)
    if left is not None:
        raise left


def close() -> None:
    """Wait until every rank is here, however long the first one writes or uploads, and close the process group.

    Every rank calls it. Raises RuntimeError where another one has failed.
    """
    if not ranks.started():
        return
    if ranks.world_size() > 1:
        store = ranks.store()
        store.add(DONE, 1)
        # A barrier would end with an error after ddp_timeout. The others have nothing to do that takes long.
        patience = distributed.distributed_c10d.default_pg_timeout.total_seconds()
        deadline = time.monotonic() + patience if ranks.rank() == 0 else float("inf")
        while store.add(DONE, 0) < ranks.world_size():
            if store.check([FAILED]) or time.monotonic() > deadline:
                raise RuntimeError("Another rank has failed, or has not come to the end.")
            time.sleep(POLL)
        ranks.barrier()  # none asks the store any more, which ends with the first rank
    distributed.destroy_process_group()


def _fail(error: BaseException) -> NoReturn:
    """Raise it where this rank is alone. Else say it, let the others know, and end the process here: they may still
    wait inside the group, and to close it would be to wait for them."""
    if ranks.world_size() == 1:
        raise error
    status = 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(error.code, int):
        status = error.code
    else:
        print(error.code, file=sys.stderr)
    with suppress(RuntimeError):  # the store is gone with the rank that held it
        ranks.store().set(FAILED, str(ranks.rank()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
