"""One output folder, one job: a lock that a dying process lets go of by itself."""

import errno
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft_ds import ranks

LOCK = "_lock"  # the hub leaves names with an underscore out of what it uploads


class OutputFolderInUse(ValueError):
    """Another job trains into this folder."""


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock inside. Every rank enters; the first one holds it, and all raise OutputFolderInUse, with
    the holder's host and pid, where another job does. A lock whose process is gone is free."""
    descriptor, refused = None, None
    if ranks.index() == 0:
        os.makedirs(folder, exist_ok=True)
        descriptor, refused = _take(Path(folder, LOCK))
    refused = ranks.gather(refused)[0]
    if refused is not None:
        raise OutputFolderInUse(refused)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _take(path: Path) -> tuple[int | None, str | None]:
    """(the open lock; why it was refused)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            warnings.warn(f"{path}: this file system has no locks ({error.strerror}); two jobs would not see each "
                          "other.", stacklevel=2)  # fmt: skip
            return descriptor, None
        holder = os.pread(descriptor, 4096, 0).decode() or "{}"
        os.close(descriptor)
        who = json.loads(holder)
        return None, (
            f"output_dir {path.parent} is in use by another job (host {who.get('host')}, pid {who.get('pid')}): wait "
            "for it, stop it, or choose another output_dir."
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    return descriptor, None
