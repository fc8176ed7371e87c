"""Atomic writes: temporary file and rename, so that a kill leaves the old file or none, never a partial one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, unique to the process, that replaces `path` when the block ends; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield aside
    os.replace(aside, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder that becomes `path`, which must not exist or be empty, when the block ends; if it
    raises, nothing is left."""
    with atomic_write(path) as aside:
        aside.mkdir()
        try:
            yield aside
        except BaseException:
            shutil.rmtree(aside)
            raise
