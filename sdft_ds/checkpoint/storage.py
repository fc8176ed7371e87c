"""Atomic checkpoints with a manifest: a checkpoint is either complete or absent.

A checkpoint is written to a temporary folder, fsynced, listed with sizes and checksums in a manifest, and renamed into
place. Leftovers of a kill, a full disk or a damaged file are detected and named; the newest complete checkpoint is
found.

What goes into a checkpoint is decided in loop/resume.py (`_save_checkpoint`).

The manifest also holds the id of the run that wrote the checkpoint and a sequence number within the folder. The newest
checkpoint is the one written last, which after a resume from an earlier step need not be that of the highest step.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdft_ds.distributed import engines, ranks
from sdft_ds.distributed.engines import LATEST, UNIVERSAL

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")


class CannotResume(ValueError):
    """This run cannot resume from the given or found checkpoint. Raised on all ranks."""


class DamagedCheckpoint(CannotResume):
    """The given checkpoint is not complete."""


def reached(point: str) -> None:
    """No-op hook; tests replace it to interrupt a save once it is begun, written, checked, listed or renamed."""


@contextmanager
def writing(run_folder: str, step: int, run: str | None = None) -> Iterator[str]:
    """Yields a temporary folder for the checkpoint of `step`, renamed to `checkpoint-<step>` when the block ends.
    Collective: every rank writes its own files, and none continues before the checkpoint is complete. run: its id."""
    final = Path(run_folder, f"checkpoint-{step}")
    aside, replaced = (Path(run_folder, f".{what}-{final.name}") for what in ("incomplete", "replaced"))
    if ranks.rank() == 0:
        _restore_replaced(run_folder)
        for leftover in (aside, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    reached("begun")
    yield str(aside)
    reached("written")
    ranks.barrier()
    mine = {name: _synced_entry(aside / name) for name in _share(_files(aside))}
    entries = {name: entry for part in ranks.all_gather_objects(mine) for name, entry in part.items()}
    reached("checked")
    if ranks.rank() == 0:
        about = {"step": step, "run": run, "order": _next_order(run_folder), "files": entries}
        _write_synced(aside / MANIFEST, json.dumps(about, indent=1, sort_keys=True))
        for folder in {(aside / name).parent for name in entries} | {aside}:
            _sync_folder(folder)
        reached("listed")
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    reached("renamed")
    ranks.barrier()


def _restore_replaced(run_folder: str | Path) -> None:
    """Undo a rewrite of a checkpoint that was killed after the old one had been moved away."""
    for old in Path(run_folder).glob(".replaced-checkpoint-*"):
        final = old.with_name(old.name.removeprefix(".replaced-"))
        if not final.exists():
            old.rename(final)


def _files(folder: Path) -> list[str]:
    """The files in a folder as seen by this rank, as relative paths."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _share(seen: list[str]) -> list[str]:
    """The files that this rank checksums: each file is assigned to one of the ranks that see it. On a network file
    system a listing may miss another node's files, but never those that the node itself wrote."""
    seen_by: dict[str, list[int]] = {}
    for rank, names in enumerate(ranks.all_gather_objects(seen)):
        for name in names:
            seen_by.setdefault(name, []).append(rank)
    return [name for i, name in enumerate(sorted(seen_by)) if seen_by[name][i % len(seen_by[name])] == ranks.rank()]


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
    """What is wrong with a checkpoint, naming the file; None if it is complete. Collective: each rank checks a share
    of the files."""
    folder = Path(folder)
    # Rank 0's view counts for all: with differing views some ranks would wait for the others forever.
    wrong, entries = ranks.all_gather_objects(_listed(folder) if ranks.rank() == 0 else None)[0]
    if wrong is not None:
        return wrong
    found = None
    for name, entry in sorted(entries.items())[ranks.rank() :: ranks.world_size()]:
        found = found or _file_problem(folder / name, entry)
    return next((each for each in ranks.all_gather_objects(found) if each), None)


def _listed(folder: Path) -> tuple[str | None, dict[str, dict[str, int | str]]]:
    """Returns (why the list of files cannot be read, the list)."""
    manifest = folder / MANIFEST
    if not folder.is_dir():
        return f"{folder} does not exist", {}
    if not manifest.exists():
        return f"{manifest} is missing: the checkpoint was not completed, or not written by this program", {}
    entries = _entries(manifest)
    return (None, entries) if entries else (f"{manifest} is damaged", {})


def _content(manifest: Path) -> dict[str, Any]:
    """The contents of a manifest; empty if the file is missing or invalid."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(manifest: Path) -> dict[str, dict[str, int | str]] | None:
    """The files listed in a manifest; None if it is invalid."""
    files = _content(manifest).get("files")
    if isinstance(files, dict) and all(name.isprintable() and _is_entry(entry) for name, entry in files.items()):
        return files
    return None


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def _file_problem(path: Path, entry: dict[str, int | str]) -> str | None:
    if not os.path.isfile(path):
        return f"{path} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{path} has {size} bytes instead of {entry['size']}"
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            return f"{path} is damaged: its checksum is not the one that was written"
    return None


def checkpoints(run_folder: str | Path) -> list[Path]:
    """All folders named like checkpoints, newest first, preceded by those without a readable manifest."""
    folder = Path(run_folder)
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: (_order(path), int(NAME.fullmatch(path.name)[1])), reverse=True)


def _order(folder: Path) -> float:
    """The sequence number; 0 if written by a version without sequence numbers (sorted by step), inf if unknown."""
    content = _content(folder / MANIFEST)
    order = content.get("order", 0)
    return order if content and isinstance(order, int) else math.inf


def _next_order(run_folder: str) -> int:
    orders = (_order(folder) for folder in checkpoints(run_folder))
    return 1 + max((order for order in orders if order < math.inf), default=0)


def run_of(folder: str | Path) -> str | None:
    """The id of the run that wrote a checkpoint; None if not recorded."""
    run = _content(Path(folder, MANIFEST)).get("run")
    return run if isinstance(run, str) else None


def step_in(run_folder: str | Path, folder: Path) -> int | None:
    """The step of a checkpoint in this run folder; None if it is elsewhere or named differently."""
    named = NAME.fullmatch(folder.name)
    return int(named[1]) if named and folder.resolve().parent == Path(run_folder).resolve() else None


def newest_complete(run_folder: str | Path, run: str | None = None) -> tuple[Path | None, list[str]]:
    """Returns (the newest complete checkpoint or None, what is wrong with the newer ones). Collective.

    run: accept only checkpoints of this run, or without a run id; None: of any run.
    """
    skipped, found = [], []
    if ranks.rank() == 0:
        _restore_replaced(run_folder)
        found = [(folder, run_of(folder)) for folder in checkpoints(run_folder)]
    for folder, owner in ranks.all_gather_objects(found)[0]:
        foreign = run is not None and owner not in (None, run)
        wrong = f"{folder} was written by another run" if foreign else problem(folder)
        if wrong is None:
            return folder, skipped
        skipped.append(wrong)
    return None, skipped


def rotate(run_folder: str, run: str, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run, down to `limit`; never its newest, `best`, or another run's."""
    if limit is None or limit < 1:
        return
    named = [folder for folder in checkpoints(run_folder) if _order(folder) < math.inf]
    own = [folder for folder in named if run_of(folder) in (None, run)]
    kept = {folder for folder in own if folder == own[0] or (best is not None and folder == Path(best))}
    free = [folder for folder in reversed(own) if folder not in kept]
    for folder in free[: max(0, len(own) - max(limit, len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


def require_complete(folder: str | Path) -> None:
    """Raises DamagedCheckpoint, naming the file, if the checkpoint is not complete."""
    wrong = problem(folder)
    if wrong is not None and (within := checkpoints(str(folder))):
        raise DamagedCheckpoint(f"{folder} is the folder of a run, not a checkpoint: give {within[0]}, its last one.")
    if wrong is not None:
        raise DamagedCheckpoint(
            f"{wrong}. Resume from another checkpoint, or with resume_from_checkpoint=True (command line: "
            "--resume_from_checkpoint true) from the newest complete one."
        )


def make_universal(folder: Path) -> None:
    """Add DeepSpeed's universal format of the shards to a complete checkpoint, so that any number of ranks can load
    it.

    Raises DamagedCheckpoint, and ValueError for one without shards, which any number of ranks can load as it is.
    """
    require_complete(folder)
    if not (folder / LATEST).exists():
        raise ValueError(f"{folder} was made without DeepSpeed: any number of ranks can resume it as it is.")
    tag = (folder / LATEST).read_text().strip()
    engines.convert_to_universal(folder / tag, folder / f"{tag}_universal")
    _write_synced(folder / UNIVERSAL, f"{tag}_universal")
    listed = json.loads((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    # A second conversion replaces the files of the first.
    added = (UNIVERSAL, f"{tag}_universal")
    listed["files"] |= {
        name: _synced_entry(path)
        for path in files
        if (name := str(path.relative_to(folder))) not in listed["files"] or Path(name).parts[0] in added
    }
    _write_synced(folder / f".{MANIFEST}", json.dumps(listed, indent=1, sort_keys=True))
    os.replace(folder / f".{MANIFEST}", folder / MANIFEST)
