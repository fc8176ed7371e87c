"""The splits of a data set on disk or on the hub, as stored."""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, Value, load_dataset, load_from_disk
from huggingface_hub import constants

from sdft_ds.data.loading import csv_files, json_files
from sdft_ds.data.loading.file_kinds import KINDS, check_beginning, kind_of
from sdft_ds.data.rows import DataError
from sdft_ds.data.streams import reading

Tell = Callable[[str], None]
TIMEOUT = 10  # seconds for a connection to the hub


def from_hub(name: str, config: str | None, revision: str | None, streaming: bool) -> DatasetDict:
    """Raises DataError, naming the data set; also, instead of retrying for a minute, if the hub cannot be reached."""
    where = f"dataset_name {name}"
    if not constants.is_offline_mode() and not os.path.exists(name):
        try:
            requests.head(constants.ENDPOINT, timeout=TIMEOUT)
        except requests.exceptions.SSLError:  # settings of huggingface_hub's own client may know the certificate
            pass
        except requests.ConnectionError:
            raise DataError(
                f"{where}: {constants.ENDPOINT} cannot be reached. HF_HUB_OFFLINE=1 reads what was downloaded before; "
                "dataset_path reads files."
            ) from None
    return _load(where, name, streaming, name=config, revision=revision)


def from_paths(
    paths: list[str], where: str, train: str, test: str, streaming: bool, columns: Collection[str], tell: Tell
) -> Dataset | DatasetDict | IterableDatasetDict:
    """A single file is the split `train`; of several, those whose name contains `test` as a word are the split `test`.

    where: how messages name the paths. columns: names that only a row has. tell: called with notes on what was
    detected. Raises DataError or FileNotFoundError, naming the path and the alternatives.
    """
    if len(paths) == 1 and is_saved(Path(paths[0])):
        with reading(where):
            return load_from_disk(paths[0])
    files = [file for path in paths for file in _files_of(path, where)]
    splits = {train: files}
    if len(files) > 1:
        word = re.compile(rf"(?<![a-z]){re.escape(test)}(?![a-z])", re.IGNORECASE)
        of_test = [file for file in files if word.search(file.stem)]
        splits = {train: [file for file in files if file not in of_test], test: of_test}
    return _load_files({split: some for split, some in splits.items() if some}, where, streaming, columns, tell)


def is_saved(path: Path) -> bool:
    """Whether it is a folder by save_to_disk."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _files_of(given: str, where: str) -> list[Path]:
    """The file of that name, the files in a folder (recursively, without hidden ones), or those matching a pattern."""
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        found = sorted(file for file in below if file.is_file() and kind_of(file).loader)
        if not found:
            raise DataError(f"{where}: {path} holds no {', '.join(KINDS)} file and is no save_to_disk folder.")
        return found
    found = sorted(Path(name) for name in glob.glob(given, recursive=True) if os.path.isfile(name))
    if not found:
        what = "fits no file" if glob.has_magic(given) else "does not exist"
        raise FileNotFoundError(f"{where}: {given} {what}.")
    return found


def _load_files(
    splits: dict[str, list[Path]], where: str, streaming: bool, columns: Collection[str], tell: Tell
) -> DatasetDict | IterableDatasetDict:
    files = [file for some in splits.values() for file in some]
    loaders = {kind_of(file).loader for file in files}
    if len(loaders) > 1 or None in loaders:
        names = {kind_of(file).suffix if kind_of(file).loader else "".join(file.suffixes[-2:]) for file in files}
        raise DataError(
            f"{where}: files of one kind out of {', '.join(KINDS)} are needed, found {', '.join(sorted(names))}."
        )
    (loader,) = loaders
    options: dict[str, Any] = {}
    with reading(where):
        for file in files:
            check_beginning(file)
        if loader == "csv":
            dialect = _common_dialect(files)
            options = _csv_options(dialect)
            if dialect.described:
                tell(f"{where} is read with {dialect.described}.")
        elif loader == "json":
            splits = {split: [json_files.as_rows(file, columns) for file in some] for split, some in splits.items()}
    names = {split: [str(file) for file in some] for split, some in splits.items()}
    with lines_named(files, where):
        return _load(where, loader, streaming, data_files=names, **options)


@contextmanager
def lines_named(paths: Iterable[str | Path], where: str) -> Iterator[None]:
    """An error in reading these files, or those in these folders, becomes a DataError with the line, as an editor
    counts it: readers name none, or another one."""
    try:
        yield
    except DataError as error:
        if error.__cause__ is None:  # not by a reader
            raise
        with reading(where):
            for file in [file for path in paths if not is_saved(Path(path)) for file in _files_of(str(path), where)]:
                if kind_of(file).loader == "json":
                    json_files.check_json(file)
                elif kind_of(file).loader == "csv":
                    csv_files.check_records(file, unclosed="EOF inside string" in str(error))
        raise


def _common_dialect(files: list[Path]) -> csv_files.CsvDialect:
    found = {csv_files.detect(file): file for file in files}
    if len(found) > 1:
        of = "; ".join(
            f"{file} has the columns {', '.join(d.columns)} in {d.encoding}, with the delimiter {d.delimiter!r}"
            for d, file in list(found.items())[:2]
        )
        raise DataError(f"Files of one header, delimiter and encoding are needed: {of}.")
    return next(iter(found))


def _csv_options(dialect: csv_files.CsvDialect) -> dict[str, Any]:
    """Every cell is a text: neither 007 nor NA is anything else."""
    return {
        "sep": dialect.delimiter, "encoding": dialect.encoding, "skipinitialspace": dialect.padded, "header": 0,
        "column_names": list(dialect.columns), "na_filter": False,
        "features": Features({name: Value("string") for name in dialect.columns}),
    }  # fmt: skip


def _load(where: str, kind: str, streaming: bool, **options: Any) -> DatasetDict | IterableDatasetDict:
    with reading(where):
        return load_dataset(kind, streaming=streaming, **options)
