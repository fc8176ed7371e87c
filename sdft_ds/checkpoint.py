"""A folder is a complete checkpoint, or it is none.

A checkpoint is written aside, synced to the disk, listed with sizes and checksums in a manifest, and renamed into
place. What a kill, a full disk or a broken file leaves is recognised and named; the newest complete one is found.

python -m sdft_ds.checkpoint verify FOLDER         say what is wrong with a checkpoint
python -m sdft_ds.checkpoint universal FOLDER      let DeepSpeed resume it on another number of ranks
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    entries = _entries(manifest)
    if not entries:
        return f"{manifest} is damaged"
    found = None
    for name, entry in sorted(entries.items())[ranks.index() :: ranks.count()]:
        found = found or _file_problem(folder / name, entry)
    return next((each for each in ranks.gather(found) if each), None)


def _entries(manifest: Path) -> dict[str, dict[str, int | str]] | None:
    """What a manifest lists; None for a file that is none."""
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
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
    """All folders that are named as checkpoints, the newest first."""
    folder = Path(run_folder)
    named = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(named, key=lambda path: -int(NAME.fullmatch(path.name)[1]))


def step_in(run_folder: str | Path, folder: Path) -> int | None:
    """The step of a checkpoint of this run folder; None for one that lies elsewhere or has another name."""
    named = NAME.fullmatch(folder.name)
    return int(named[1]) if named and folder.resolve().parent == Path(run_folder).resolve() else None


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
