"""One output folder, one job, one run: a lock that a dying process releases by itself, and the identity of the run.

A run begins with a start that resumes nothing, and goes on with every resume. Its id lies in the folder and in each of
its checkpoints, so that what two runs leave in one folder is told apart.
"""

import errno
import fcntl
import json
import os
import socket
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft_ds import checkpoint, ranks
from sdft_ds.whole_files import written_aside

# The hub leaves names with an underscore out of what it uploads.
LOCK = "_lock"
RUN = "_run"
EARLIER = "_earlier_runs"
# What a run writes beside its weights and checkpoints, line by line or step by step.
RECORDS = ("run.json", "metrics.jsonl", "completions", "evaluations.jsonl", "evaluations", "report.html")

_held: set[str] = set()  # the folders that this process has locked
_begun: set[str] = set()  # the ids of the runs that this process began


class OutputFolderInUse(ValueError):
    """Another job trains into this folder, or another run's checkpoints lie in it. All ranks raise it."""


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock inside. Every rank enters; the first one holds it, and all raise OutputFolderInUse, with
    the holder's host and pid, where another job does. A lock whose process is gone is free."""
    path = os.path.realpath(folder)
    if path in _held:
        yield
        return
    descriptor, refused = None, None
    if ranks.index() == 0:
        os.makedirs(folder, exist_ok=True)
        descriptor, refused = _take(Path(folder, LOCK))
    refused = ranks.gather(refused)[0]
    if refused is not None:
        raise OutputFolderInUse(refused)
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
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


def run_of(folder: str) -> str | None:
    """The id of the run that the folder holds, as the first rank sees it; None where there is none. Every rank calls
    it."""
    path = Path(folder, RUN)
    return ranks.gather(path.read_text() if ranks.index() == 0 and path.exists() else None)[0]


def new_run() -> str:
    """The id of a run that begins now. Every rank calls it."""
    return ranks.gather(f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")[0]


def refuse_others(folder: str, run: str | None = None) -> None:
    """Raise OutputFolderInUse where checkpoints lie in the folder that are neither of `run` nor of a run that this
    process began: they would be taken for those of the run that starts, or written over. Every rank calls it."""
    newest = None
    if ranks.index() == 0:
        owned = [(checkpoint.run_of(found), found) for found in checkpoint.checkpoints(folder)]
        newest = next((found for owner, found in owned if owner not in _begun and (run is None or owner != run)), None)
    newest = ranks.gather(newest)[0]
    if newest is not None:
        raise OutputFolderInUse(
            f"output_dir {folder} holds checkpoints of an earlier run, the newest {newest.name}. To go on with that "
            f"run, resume from it (resume_from_checkpoint: true, or {newest}); to start another one, choose another "
            "output_dir, or move them away."
        )


def begin(folder: str, run: str, fresh: bool) -> Path | None:
    """The folder holds `run` from now on. What another one had recorded is moved to a folder of its own, which is
    returned. fresh: nothing is resumed. On the first rank alone."""
    before = Path(folder, RUN).read_text() if Path(folder, RUN).exists() else None
    moved = None
    if fresh or before not in (None, run):
        moved = _set_aside(Path(folder), before or "before-" + run)
    if fresh:
        _begun.add(run)
    if before != run:
        with written_aside(Path(folder, RUN)) as aside:
            aside.write_text(run)
    return moved


def _set_aside(folder: Path, name: str) -> Path | None:
    records = [folder / record for record in RECORDS if (folder / record).exists()]
    if not records:
        return None
    target = folder / EARLIER / name
    target.mkdir(parents=True, exist_ok=True)
    for record in records:
        record.rename(target / record.name)
    return target
