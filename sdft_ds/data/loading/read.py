"""The readers of the command line for Python: sdft_ds.read_dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from sdft_ds.data.loading import splits
from sdft_ds.data.loading.file_kinds import display
from sdft_ds.data.loading.formats import AUTO, COLUMN_NAMES, DEMONSTRATION_TEMPLATE, FORMATS
from sdft_ds.data.loading.mapping import AnyDataset, RowReader
from sdft_ds.data.rows import DataError
from sdft_ds.data.streams import reading
from sdft_ds.data.validation import name_of
from sdft_ds.distributed import ranks

Rows = Sequence[dict[str, Any]]
Splits = DatasetDict | IterableDatasetDict


def read_dataset(
    source: str | Path | Sequence[str | Path] | AnyDataset | Splits | Rows,
    split: str = "train",
    *,
    dataset_format: str = AUTO,
    prompt_column: str | None = None,
    system_column: str | None = None,
    privileged_context_column: str | None = None,
    teacher_prompt_column: str | None = None,
    tools_column: str | None = None,
    golden_response_column: str | None = None,
    demonstration_template: str = DEMONSTRATION_TEMPLATE,
    prompt_as: Literal["user", "text"] = "user",
    streaming: bool = False,
) -> AnyDataset:
    """A data set with the columns that the trainers read, from one in a usual format.

    source: files (json, jsonl, csv, tsv, also .gz; parquet, arrow), a folder or a pattern of them, a save_to_disk
    folder, a data set of `datasets`, or rows as a list of dicts. Everything else is named and works as on the command
    line; prompt_as: "user" for a model with a chat template, "text" for one without.

    Prints the format and the columns that are not read. Raises DataError or FileNotFoundError, with the remedy.
    """
    if dataset_format not in (AUTO, *FORMATS):
        raise ValueError(f"dataset_format={dataset_format!r}: it is one of {', '.join([AUTO, *FORMATS])}.")
    if prompt_as not in ("user", "text"):
        raise ValueError(f"prompt_as={prompt_as!r}: it is user or text.")
    given = {
        "prompt": prompt_column, "system": system_column, "privileged_context": privileged_context_column,
        "teacher_prompt": teacher_prompt_column, "tools": tools_column, "golden_response": golden_response_column,
    }  # fmt: skip
    given = {role: column for role, column in given.items() if column is not None}
    reader = RowReader(dataset_format, given, demonstration_template, prompt_as == "user", keep_response=True)
    dataset, name, paths = _stored(source, split, streaming, COLUMN_NAMES | {*given.values()})
    with splits.lines_named(paths, name):
        return reader.read(dataset, name, ranks.tell)


def _stored(source: Any, split: str, streaming: bool, columns: set[str]) -> tuple[AnyDataset, str, list[str]]:
    """(the data set as stored, its name in messages, its paths)."""
    if isinstance(source, Dataset | IterableDataset):
        return source, name_of(source, "the data set"), []
    if isinstance(source, DatasetDict | IterableDatasetDict):
        return _split(source, split, "the data set"), "the data set", []
    given = list(source) if isinstance(source, list | tuple) else [source]
    if given and all(isinstance(row, dict) for row in given):
        with reading("the data set in memory"):
            return Dataset.from_list(given, on_mixed_types="use_json"), "the data set in memory", []
    if not given or not all(isinstance(path, str | Path) for path in given):
        raise DataError(
            f"{type(source).__name__} is no source of rows: give files or a folder, a data set of `datasets`, or a "
            "list of dicts."
        )
    paths = [str(path) for path in given]
    name = display(paths)
    found = splits.from_paths(paths, name, "train", "test", streaming, columns, ranks.tell)
    if isinstance(found, Dataset):
        found = DatasetDict({"train": found})
    return _split(found, split, name), name, paths


def _split(found: Splits, split: str, name: str) -> AnyDataset:
    if split not in found:
        raise DataError(f"{name} has the splits {', '.join(found)}, not {split!r}.")
    return found[split]
