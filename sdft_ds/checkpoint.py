"""A folder is a complete checkpoint, or it is none.

A checkpoint is written aside, synced to the disk, listed with sizes and checksums in a manifest, and renamed into
place. What a kill, a full disk or a broken file leaves is recognised and named; the newest complete one is found.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft_ds import ranks

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(ValueError):
    """A checkpoint that was named and is not complete."""


def reached(point: str) -> None:
    """Does nothing; tests put something here that interrupts a save when it was begun, written, checked, listed or
    renamed."""


@contextmanager
def writing(run_folder: str, step: int) -> Iterator[str]:
    """A folder to write the checkpoint of `step` into; when the block ends it becomes `checkpoint-<step>`. Every rank
    enters and leaves it, and writes its own files; none goes on before the checkpoint is complete."""
    final = Path(run_folder, f"checkpoint-{step}")
    aside, replaced = (Path(run_folder, f".{what}-{final.name}") for what in ("incomplete", "replaced"))
    if ranks.index() == 0:
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    reached("begun")
    yield str(aside)
    reached("written")
    ranks.barrier()
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    mine = {str(path.relative_to(aside)): _synced_entry(path) for path in files[ranks.index() :: ranks.count()]}
    entries = {name: entry for part in ranks.gather(mine) for name, entry in part.items()}
    reached("checked")
    if ranks.index() == 0:
        _write_synced(aside / MANIFEST, json.dumps({"step": step, "files": entries}, indent=1, sort_keys=True))
        for folder in {path.parent for path in files} | {aside}:
            _sync_folder(folder)
        reached("listed")
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    reached("renamed")
    ranks.barrier()


def _synced_entry(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem(folder: str | Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is complete. Every rank checks a share of it."""
    folder = Path(folder)
    if not folder.is_dir():
        return f"{folder} does not exist"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return f"{manifest} is missing: the checkpoint was not completed, or not written by this program"
    try:
        entries = sorted(json.loads(manifest.read_text())["files"].items())
    except (ValueError, KeyError):
        return f"{manifest} is damaged"
    found = None
    for name, entry in entries[ranks.index() :: ranks.count()]:
        found = found or _file_problem(folder / name, entry)
    return next((each for each in ranks.gather(found) if each), None)


def _file_problem(path: Path, entry: dict[str, int | str]) -> str | None:
    if not path.exists():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path} has {size} bytes instead of {entry['size']}"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return f"{path} is damaged: its checksum is not the one that was written"
    return None


def checkpoints(run_folder: str | Path) -> list[Path]:
    """All folders that are named as checkpoints, the newest first."""
    folder = Path(run_folder)
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: -int(NAME.fullmatch(path.name)[1]))


def newest_complete(run_folder: str | Path) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint, or None; what is wrong with the newer ones). Every rank calls it."""
    skipped = []
    for folder in checkpoints(run_folder):
        wrong = problem(folder)
        if wrong is None:
            return folder, skipped
        skipped.append(wrong)
    return None, skipped


def require_complete(folder: str | Path) -> None:
    """Raises DamagedCheckpoint, which names the file, where the checkpoint is not complete."""
    wrong = problem(folder)
    if wrong is not None:
        raise DamagedCheckpoint(
            f"{wrong}. Resume from another checkpoint, or with --resume_from_checkpoint true from the newest complete "
            "one."
        )
