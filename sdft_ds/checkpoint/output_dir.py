"""Advisory lock on output_dir, released automatically when the process dies, and the id of the run in it.

A run begins with a start that does not resume, and continues with every resume. Its id is stored in the folder and in
each of its checkpoints, to tell apart the files of two runs in one folder.
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

from sdft_ds.checkpoint import storage
from sdft_ds.distributed import ranks
from sdft_ds.files import atomic_write

# Names with a leading underscore are never uploaded to the hub (loop/hub_upload.py).
LOCK = "_lock"
RUN = "_run"
EARLIER = "_earlier_runs"
# What a run writes in addition to weights and checkpoints, appended per log line or step.
RECORDS = ("run.json", "metrics.jsonl", "completions", "evaluations.jsonl", "evaluations", "report.html")

_held: set[str] = set()  # folders locked by this process
_begun: set[str] = set()  # ids of runs started by this process


class OutputFolderInUse(ValueError):
    """Another job trains into this folder, or it holds another run's checkpoints. Raised on all ranks."""


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock within the block. Collective: rank 0 holds it. Raises OutputFolderInUse on all ranks,
    with the holder's host and pid, if another job holds it. The lock of a dead process is free."""
    path = os.path.realpath(folder)
    if path in _held:
        yield
        return
    descriptor, refused = None, None
    if ranks.rank() == 0:
        os.makedirs(folder, exist_ok=True)
        descriptor, refused = _take(Path(folder, LOCK))
    refused = ranks.all_gather_objects(refused)[0]
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
    """Returns (open file descriptor of the lock, reason for refusal)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            warnings.warn(f"{path}: this file system has no locks ({error.strerror}); two jobs in this folder "
                          "would not notice each other.", stacklevel=2)  # fmt: skip
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
    """The id of the run in the folder, as read by rank 0; None if there is none. Collective."""
    path = Path(folder, RUN)
    return ranks.all_gather_objects(path.read_text() if ranks.rank() == 0 and path.exists() else None)[0]


def new_run() -> str:
    """The id of a new run. Collective."""
    return ranks.all_gather_objects(f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")[0]


def refuse_others(folder: str, run: str | None = None) -> None:
    """Raises OutputFolderInUse if the folder holds checkpoints that are neither of `run` nor of a run started by this
    process: they would be mistaken for the new run's, or overwritten. Collective."""
    newest = None
    if ranks.rank() == 0:
        owned = [(storage.run_of(found), found) for found in storage.checkpoints(folder)]
        newest = next((found for owner, found in owned if owner not in _begun and (run is None or owner != run)), None)
    newest = ranks.all_gather_objects(newest)[0]
    if newest is not None:
        raise OutputFolderInUse(
            f"output_dir {folder} holds checkpoints of an earlier run, the newest {newest.name}. To continue that "
            f"run, resume from it (resume_from_checkpoint: true, or {newest}); to start a new one, choose another "
            "output_dir, or move them away."
        )


def begin(folder: str, run: str, fresh: bool) -> Path | None:
    """Mark the folder as belonging to `run`. Another run's records are moved to a folder of their own, which is
    returned. fresh: nothing is resumed. Called on rank 0 only."""
    before = Path(folder, RUN).read_text() if Path(folder, RUN).exists() else None
    moved = None
    if fresh or before not in (None, run):
        moved = _set_aside(Path(folder), before or "before-" + run)
    if fresh:
        _begun.add(run)
    if before != run:
        with atomic_write(Path(folder, RUN)) as aside:
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
