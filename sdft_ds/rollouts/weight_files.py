"""The folder through which weights reach vLLM's servers: its generations, and what dead runs have left beside it."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
LOCK = "lock"


class WeightFiles:
    """Generations of weights in a folder of their own in `parent`, removed when the object or the program ends.

    A run that is killed cannot remove its folder: the next run in the same parent does, because the lock of a dead
    process is free. Where the file system has no locks, a run removes only what a run with its own output_dir left.
    """

    def __init__(self, parent: Path, output_dir: str):
        name = f"sdft_ds-{hashlib.blake2b(os.path.abspath(output_dir).encode(), digest_size=6).hexdigest()}"
        parent = parent.absolute()
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        shutil.rmtree(parent / name, ignore_errors=True)
        # Locked before it has a name by which another run could take it for abandoned.
        unnamed = Path(tempfile.mkdtemp(prefix=".sdft_ds-", dir=parent))
        unnamed.chmod(0o755)  # servers may be another user's
        descriptor = os.open(unnamed / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        _lock(descriptor)
        self.folder = parent / name
        os.replace(unnamed, self.folder)
        self.remove = weakref.finalize(self, _remove, self.folder, descriptor)

    def path(self, generation: int) -> Path:
        return self.folder / f"weights-{generation}"

    @contextmanager
    def written(self, generation: int) -> Iterator[Path]:
        """Yields a temporary folder, which becomes the generation's at the end. One older generation is kept."""
        for old in sorted(self.folder.glob("weights-*"), key=os.path.getmtime)[:-1]:
            shutil.rmtree(old)
        part = self.folder / f"weights-{generation}.part"
        part.mkdir()
        yield part
        os.replace(part, self.path(generation))


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of runs that have died."""
    for folder in parent.glob("sdft_ds-*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, descriptor: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Whether the lock was free, and is now held. The file system may have no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(folder: Path) -> bool:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:  # another user's, or being removed
        return False
    try:
        return _lock(descriptor)
    finally:
        os.close(descriptor)
