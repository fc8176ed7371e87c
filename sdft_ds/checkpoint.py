"""A folder is a complete checkpoint, or it is none.

A checkpoint is written aside, synced to the disk, listed with sizes and checksums in a manifest, and renamed into
place. What a kill, a full disk or a broken file leaves is recognised and named; the newest complete one is found.

The manifest also holds the id of the run that wrote the checkpoint, and its number in the order in which the folder's
checkpoints were written: the newest is the one that was written last, which after a resume from an earlier step is not
the one of the highest step.

python -m sdft_ds.checkpoint verify FOLDER         say what is wrong with a checkpoint
python -m sdft_ds.checkpoint universal FOLDER      let DeepSpeed resume it on another number of ranks
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdft_ds import ranks

MANIFEST = "manifest.json"
LATEST, UNIVERSAL = "latest", "latest_universal"  # DeepSpeed's: the name of the folder with the ranks' shards
NAME = re.compile(r"checkpoint-(\d+)")


class CannotResume(ValueError):
    """This run cannot go on from the checkpoint that was named or found. All ranks raise it."""


class DamagedCheckpoint(CannotResume):
    """A checkpoint that was named and is not complete."""


def reached(point: str) -> None:
    """Does nothing; tests put something here that interrupts a save when it was begun, written, checked, listed or
    renamed."""


@contextmanager
def writing(run_folder: str, step: int, run: str | None = None) -> Iterator[str]:
    """A folder to write the checkpoint of `step` into; when the block ends it becomes `checkpoint-<step>`. Every rank
    enters and leaves it, and writes its own files; none goes on before the checkpoint is complete. run: its id."""
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
    mine = {name: _synced_entry(aside / name) for name in _share(_files(aside))}
    entries = {name: entry for part in ranks.gather(mine) for name, entry in part.items()}
    reached("checked")
    if ranks.index() == 0:
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


def _files(folder: Path) -> list[str]:
    """The files in a folder as this rank sees it, by their paths inside."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _share(seen: list[str]) -> list[str]:
    """The files that this rank reads, of all that any rank sees: each is read by one rank that sees it. On a network
    file system another node's files may be missing from a listing, never those that the node itself wrote."""
    seen_by: dict[str, list[int]] = {}
    for rank, names in enumerate(ranks.gather(seen)):
        for name in names:
            seen_by.setdefault(name, []).append(rank)
    return [name for i, name in enumerate(sorted(seen_by)) if seen_by[name][i % len(seen_by[name])] == ranks.index()]


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
    # What the first rank sees counts: where ranks saw different things, some would wait for the others without end.
    wrong, entries = ranks.gather(_listed(folder) if ranks.index() == 0 else None)[0]
    if wrong is not None:
        return wrong
    found = None
    for name, entry in sorted(entries.items())[ranks.index() :: ranks.count()]:
        found = found or _file_problem(folder / name, entry)
    return next((each for each in ranks.gather(found) if each), None)


def _listed(folder: Path) -> tuple[str | None, dict[str, dict[str, int | str]]]:
    """(why there is no list of files; the list)."""
    manifest = folder / MANIFEST
    if not folder.is_dir():
        return f"{folder} does not exist", {}
    if not manifest.exists():
        return f"{manifest} is missing: the checkpoint was not completed, or not written by this program", {}
    entries = _entries(manifest)
    return (None, entries) if entries else (f"{manifest} is damaged", {})


def _content(manifest: Path) -> dict[str, Any]:
    """What a manifest says; nothing for a file that is missing, or is none."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError):
        return {}
    return content if isinstance(content, dict) else {}


def _entries(manifest: Path) -> dict[str, dict[str, int | str]] | None:
    """What a manifest lists; None for a file that is none."""
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
    """All folders that are named as checkpoints, the newest first, and before it those that do not say when they were
    written."""
    folder = Path(run_folder)
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: (_order(path), int(NAME.fullmatch(path.name)[1])), reverse=True)


def _order(folder: Path) -> float:
    """0 for all checkpoints of versions that wrote no order: their steps say it."""
    content = _content(folder / MANIFEST)
    order = content.get("order", 0)
    return order if content and isinstance(order, int) else math.inf


def _next_order(run_folder: str) -> int:
    orders = (_order(folder) for folder in checkpoints(run_folder))
    return 1 + max((order for order in orders if order < math.inf), default=0)


def run_of(folder: str | Path) -> str | None:
    """The id of the run that wrote a checkpoint; None where it does not say."""
    run = _content(Path(folder, MANIFEST)).get("run")
    return run if isinstance(run, str) else None


def step_in(run_folder: str | Path, folder: Path) -> int | None:
    """The step of a checkpoint of this run folder; None for one that lies elsewhere or has another name."""
    named = NAME.fullmatch(folder.name)
    return int(named[1]) if named and folder.resolve().parent == Path(run_folder).resolve() else None


def newest_complete(run_folder: str | Path, run: str | None = None) -> tuple[Path | None, list[str]]:
    """(the newest complete checkpoint, or None; what is wrong with the newer ones). Every rank calls it.

    run: that checkpoint is of this run, or does not say of which it is; None: of any run.
    """
    skipped, found = [], []
    if ranks.index() == 0:
        found = [(folder, run_of(folder)) for folder in checkpoints(run_folder)]
    for folder, owner in ranks.gather(found)[0]:
        foreign = run is not None and owner not in (None, run)
        wrong = f"{folder} was written by another run" if foreign else problem(folder)
        if wrong is None:
            return folder, skipped
        skipped.append(wrong)
    return None, skipped


def rotate(run_folder: str, run: str, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run, down to `limit`; neither its newest, nor `best`, nor those of others."""
    if limit is None or limit < 1:
        return
    named = [folder for folder in checkpoints(run_folder) if _order(folder) < math.inf]
    own = [folder for folder in named if run_of(folder) in (None, run)]
    kept = {folder for folder in own if folder == own[0] or (best is not None and folder == Path(best))}
    free = [folder for folder in reversed(own) if folder not in kept]
    for folder in free[: max(0, len(own) - max(limit, len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


def require_complete(folder: str | Path) -> None:
    """Raises DamagedCheckpoint, which names the file, where the checkpoint is not complete."""
    wrong = problem(folder)
    if wrong is not None:
        raise DamagedCheckpoint(
            f"{wrong}. Resume from another checkpoint, or with --resume_from_checkpoint true from the newest complete "
            "one."
        )


def make_universal(folder: Path) -> None:
    """Add DeepSpeed's universal form of the shards to a complete checkpoint: it can be read by any number of ranks.

    Raises DamagedCheckpoint, and ValueError for one without shards, which any number of ranks can read as it is.
    """
    require_complete(folder)
    if not (folder / LATEST).exists():
        raise ValueError(f"{folder} was made without DeepSpeed: any number of ranks can resume it as it is.")
    tag = (folder / LATEST).read_text().strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / tag), "--output_folder", str(folder / f"{tag}_universal")]
    subprocess.run(command, check=True)
    _write_synced(folder / UNIVERSAL, f"{tag}_universal")
    listed = json.loads((folder / MANIFEST).read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    listed["files"] |= {
        name: _synced_entry(path) for path in files if (name := str(path.relative_to(folder))) not in listed["files"]
    }
    _write_synced(folder / f".{MANIFEST}", json.dumps(listed, indent=1, sort_keys=True))
    os.replace(folder / f".{MANIFEST}", folder / MANIFEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["verify", "universal"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        if args.what == "universal":
            make_universal(args.folder)
        else:
            require_complete(args.folder)
    except ValueError as error:
        sys.exit(f"sdft_ds: {error}")
    print(f"{args.folder} is complete.")


if __name__ == "__main__":
    main()
