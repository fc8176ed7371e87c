"""Atomic writes: temporary file + rename, so that a kill leaves the old file, or none, but never a part of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` when the block ends, each process in a file of its own; the folder
    is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield aside
    os.replace(aside, path)
