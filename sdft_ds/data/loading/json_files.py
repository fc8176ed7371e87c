"""JSON files: JSON Lines, a list of objects, or one object around the list; and the line of an error."""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets

from sdft_ds.data.loading.file_kinds import kind_of, open_bytes
from sdft_ds.data.rows import DataError
from sdft_ds.files import atomic_write


def as_rows(file: Path, columns: Collection[str]) -> Path:
    """The file, or for a JSON file that is one object around a list of rows ({"data": [...]}), those as JSON Lines in
    the cache of `datasets`. columns: names that only a row has.

    Raises DataError for an object around several lists.
    """
    found = _only_object(file)
    if not isinstance(found, dict) or not columns.isdisjoint(found):
        return file
    lists = {name: value for name, value in found.items() if _is_table(value)}
    if not lists:
        return file
    if len(lists) > 1:
        raise DataError(f"{file} is an object that holds several lists, {', '.join(lists)}: make each of them a file.")
    (rows,) = lists.values()
    about = file.stat()
    key = hashlib.sha256(repr((str(file.resolve()), about.st_mtime_ns, about.st_size)).encode()).hexdigest()
    lines = Path(datasets.config.HF_DATASETS_CACHE, "sdft_ds", f"{key}.jsonl")
    if not lines.exists():
        with atomic_write(lines) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lines


def check_json(file: Path) -> None:
    """Raises DataError, with the line as an editor counts it, for text that is not UTF-8, invalid JSON, and a line
    that is no object."""
    with open_bytes(file) as opened:
        first, begins = None, b""
        for number, line in enumerate(opened, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{file}, line {number}: not UTF-8 ({error.reason}): save it as UTF-8.") from None
            begins = begins or line.strip()[:1]
            if not text.strip() or begins == b"[":
                continue
            try:
                value = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                if first is None and kind_of(file).suffix == ".json":  # an object over several lines
                    break
                raise DataError(f"{file}, line {number}, column {error.colno}: {error.msg}.") from None
            except RecursionError:
                raise DataError(f"{file}, line {number}: too deeply nested.") from None
            first = value if first is None else first
            if not isinstance(value, dict):
                raise DataError(f"{file}, line {number}: found {text.strip()[:40]!r}; expected an object.")
        else:
            if begins != b"[":
                return
    with open_bytes(file) as opened:
        try:
            json.loads(opened.read().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 ({error.reason}): save it as UTF-8.") from None
        except RecursionError:
            raise DataError(f"{file} is too deeply nested.") from None


def _only_object(file: Path) -> Any:
    """The value of a file that holds one JSON value; None for JSON Lines, lists and invalid files."""
    with open_bytes(file) as opened:
        line = b""
        while not line.strip():  # check_beginning has seen that there is more
            line = opened.readline()
        line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            if line.lstrip().startswith(b"["):
                return None
            value = json.loads(line)
            return None if any(more.strip() for more in opened) else value
        except (ValueError, RecursionError):
            if kind_of(file).suffix == ".jsonl":
                return None
        try:
            return json.loads(line + opened.read())
        except (ValueError, RecursionError):
            return None


def _is_table(value: Any) -> bool:
    """A list of objects that are not the messages of a conversation."""
    objects = isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
    return objects and value[0].keys().isdisjoint({"role", "from"})
