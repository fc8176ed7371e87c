"""Loads data sets from files, folders or the hub, and maps their columns to those that the trainer reads."""

import glob
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)

from sdft_ds.cli.arguments import ScriptArguments
from sdft_ds.data.rows import OPTIONAL_COLUMNS, DataError, check_columns, message_text
from sdft_ds.data.streams import reading
from sdft_ds.data.validation import ROW_NUMBER

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}

EVERYDAY = files("sdft_ds.data") / "everyday_prompts.jsonl"
PER_ROW = " chat_template_kwargs is a setting, for all rows alike: --chat_template_kwargs."

AnyDataset = Dataset | IterableDataset


def load(
    args: ScriptArguments,
    evaluates: bool,
    seed: int,
    has_chat_template: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[AnyDataset, Dataset | None]:
    """Returns (training rows, evaluation rows or None unless `evaluates`), with mapped columns.

    tell: called with notes on the column mapping.

    Raises ValueError or FileNotFoundError, naming the path or the split and the alternatives.
    """
    if args.eval_fraction is not None and not evaluates:
        raise ValueError("--eval_fraction has no effect without --eval_strategy: set it, steps or epoch.")
    splits = load_splits(args)
    as_user = _as_user(args, has_chat_template)
    train = map_columns(splits[args.dataset_train_split], args, as_user, tell)
    if not evaluates:
        return train, None
    if args.eval_fraction is not None:
        return hold_out(train, args.eval_fraction, seed)
    if args.dataset_test_split not in splits:
        raise ValueError(
            f"eval_strategy needs the split {args.dataset_test_split!r}; the data set has {', '.join(splits)}. Set "
            "--dataset_test_split, or --eval_fraction."
        )
    test = map_columns(splits[args.dataset_test_split], args, as_user)
    if isinstance(test, IterableDataset):  # it is read again in every evaluation
        info, test = test.info, Dataset.from_list(list(test))
        test.info.dataset_name = f"{info.dataset_name}, split {args.dataset_test_split}"
    return train, test


def load_anchors(args: ScriptArguments, has_chat_template: bool = False) -> Dataset | None:
    """The anchors, with the column `prompt` and for SFT `golden_response`; None without --anchor_path. Raises what
    `load` raises."""
    if args.anchor_path in (None, ["none"]):
        return None
    paths = [str(EVERYDAY)] if args.anchor_path == ["everyday"] else args.anchor_path
    given = replace(
        args, dataset_path=paths, dataset_name=None, dataset_config=None, dataset_revision=None,
        dataset_streaming=False,
    )  # fmt: skip
    dataset = load_splits(given, "--anchor_path")[args.dataset_train_split]
    columns, source = dataset.column_names, given.source
    column = args.prompt_column if args.prompt_column in columns else "prompt"
    if column not in columns:
        raise ValueError(f"--anchor_path {source} has the columns {', '.join(columns)}, not {args.prompt_column!r}.")
    as_user = _as_user(args, has_chat_template)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, system = row[column], row.get(args.system_column)
        mapped = {"prompt": _conversation(prompt, system) if as_user or system else prompt}
        response = _text(row.get(args.golden_response_column))
        return mapped | ({"golden_response": response} if args.method == "sft" else {})

    with reading(source):
        mapped = dataset.map(convert, remove_columns=columns)
    mapped.info.dataset_name = source
    return mapped


def _as_user(args: ScriptArguments, has_chat_template: bool) -> bool:
    """Whether a prompt that is a text becomes the user's turn of a conversation."""
    return args.prompt_as == "user" or (args.prompt_as is None and has_chat_template)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Returns (the other rows, a held-out fraction); messages about a row keep its number in `dataset`."""
    if len(dataset) < 2:
        raise ValueError(f"--eval_fraction={fraction} of {len(dataset)} rows leaves nothing to train on.")
    numbered = dataset.add_column(ROW_NUMBER, list(range(len(dataset))))
    parts = numbered.train_test_split(max(1, round(fraction * len(dataset))), seed=seed)
    return parts["train"], parts["test"]


def load_splits(args: ScriptArguments, flag: str = "--dataset_path") -> DatasetDict | IterableDatasetDict:
    """The splits of the given data set, as stored. flag: that of the paths, for messages.

    A single file is the training split; of several, those whose name contains the test split's name as a word are the
    test split. Raises ValueError or FileNotFoundError, naming the path and the alternatives.
    """
    if args.dataset_path is None:
        where = {"name": args.dataset_config, "revision": args.dataset_revision}
        splits = _load(f"--dataset_name {args.dataset_name}", args, args.dataset_name, **where)
    else:
        splits = _load_paths(args, flag)
    if isinstance(splits, Dataset):
        splits = DatasetDict({args.dataset_train_split: splits})
    if args.dataset_streaming and isinstance(splits, DatasetDict):  # a save_to_disk folder
        splits = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    if args.dataset_train_split not in splits:
        raise ValueError(
            f"The data set has the splits {', '.join(splits)}, not {args.dataset_train_split!r}: set "
            "--dataset_train_split."
        )
    return splits


def _load_paths(args: ScriptArguments, flag: str) -> Dataset | DatasetDict | IterableDatasetDict:
    if len(args.dataset_path) == 1 and _is_saved(Path(args.dataset_path[0])):
        return load_from_disk(args.dataset_path[0])
    files = [file for path in args.dataset_path for file in _files_of(path, flag)]
    splits = {args.dataset_train_split: files}
    if len(files) > 1:
        word = re.compile(rf"(?<![a-z]){re.escape(args.dataset_test_split)}(?![a-z])", re.IGNORECASE)
        test = [file for file in files if word.search(file.stem)]
        train = [file for file in files if file not in test]
        splits = {args.dataset_train_split: train, args.dataset_test_split: test}
    return _load_files({split: some for split, some in splits.items() if some}, args, flag)


def _is_saved(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _files_of(given: str, flag: str) -> list[Path]:
    """The file of that name, the files in a folder (recursively, without hidden ones), or those matching a pattern."""
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        found = sorted(file for file in below if file.is_file() and file.suffix in LOADERS)
        if not found:
            raise ValueError(f"{flag} {path} holds no {', '.join(LOADERS)} file and is no save_to_disk folder.")
        return found
    found = sorted(Path(name) for name in glob.glob(given, recursive=True) if os.path.isfile(name))
    if not found:
        what = "fits no file" if glob.has_magic(given) else "does not exist"
        raise FileNotFoundError(f"{flag} {given} {what}.")
    return found


def _load_files(files: dict[str, list[Path]], args: ScriptArguments, flag: str) -> DatasetDict | IterableDatasetDict:
    everything = [file for some in files.values() for file in some]
    where = f"{flag} {args.source}"
    suffixes = {file.suffix for file in everything}
    if len({LOADERS.get(suffix) for suffix in suffixes}) > 1 or not suffixes <= set(LOADERS):
        raise ValueError(
            f"{where}: files of one kind out of {', '.join(LOADERS)} are needed, found {', '.join(sorted(suffixes))}."
        )
    for file in everything:
        _check_beginning(file, where)
    names = {split: [str(file) for file in some] for split, some in files.items()}
    try:
        return _load(where, args, LOADERS[suffixes.pop()], data_files=names)
    except DataError:  # which names no line, or another one's
        for file in everything:
            _check_text(file, where)
        raise


def _check_beginning(file: Path, where: str) -> None:
    """Raises ValueError for a file without rows. pyarrow's JSON reader aborts the process if the first row is `null`
    (apache/arrow#47409)."""
    with file.open("rb") as opened:
        begins = opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not begins:
        raise ValueError(f"{where}: {file} is empty.")
    if LOADERS[file.suffix] == "json" and begins[:1] not in (b"{", b"["):
        raise ValueError(
            f"{where} cannot be read: {file} begins with {begins[:10].decode(errors='replace')!r}; expected JSON "
            "Lines, one object per line, or a list of objects."
        )


def _check_text(file: Path, where: str) -> None:
    """Raises DataError for a text file that is not UTF-8, or for the first line of JSON Lines that is no JSON."""
    if file.suffix not in (".csv", ".json", ".jsonl"):
        return
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} cannot be read: {file} is not UTF-8 ({error.reason}): save it as UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if line.strip() and file.suffix == ".jsonl":
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                what = f"line {number}, column {error.colno}: {error.msg}"
                raise DataError(f"{where} cannot be read: {file}, {what}.") from None


def _load(where: str, args: ScriptArguments, kind: str, **options: Any) -> DatasetDict | IterableDatasetDict:
    with reading(where):
        return load_dataset(kind, streaming=args.dataset_streaming, **options)


def map_columns(
    dataset: AnyDataset,
    args: ScriptArguments,
    as_user: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> AnyDataset:
    """The data set with the columns `prompt` and `privileged_context`, and, if present, `teacher_prompt`, `tools` and
    (for supervised fine-tuning) `golden_response`. Its info names its source, for messages. as_user: a plain-text
    prompt becomes the user's turn of a conversation.

    The context is the row's own or else the demonstration template filled with its golden response. Invalid rows are
    kept, for the trainer to report.
    """
    source = args.source or "the data set"
    columns = _columns(dataset, source)
    for f in fields(args):
        name = getattr(args, f.name)
        if f.name.endswith("_column") and name not in (f.default, *columns):
            raise ValueError(f"--{f.name}={name}, but {source} has the columns {', '.join(columns)}.")
    given = {column: getattr(args, f"{column}_column") for column in OPTIONAL_COLUMNS}
    given = {column: name for column, name in given.items() if name in columns}
    contexts = [n for n in (args.privileged_context_column, args.golden_response_column) if n in columns]
    made = ["prompt"] if args.prompt_column in columns else []
    try:
        check_columns([*made, *given, *(["privileged_context"] if contexts else [])], columns, args.makes_contexts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    template = Template(args.demonstration_template)
    _check_template(template)
    responses = args.method == "sft" and args.golden_response_column in columns
    as_conversation = as_user or args.system_column is not None
    read = {args.prompt_column, args.system_column, *given.values(), *contexts}
    others = [name for name in columns if name not in {*read, "prompt", "privileged_context", *OPTIONAL_COLUMNS}]
    kept = others if args.makes_contexts else []  # for functions of the user's
    if unread := [name for name in columns if name not in {*read, *kept}]:
        tell(f"Columns not read: {', '.join(unread)}." + (PER_ROW if "chat_template_kwargs" in unread else ""))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[args.prompt_column]
        context = row.get(args.privileged_context_column)
        response = _text(row.get(args.golden_response_column))
        if context is None and response:
            context = template.substitute(output_text=response, orig_content=_text(_last(prompt)))
        if as_conversation:
            prompt = _conversation(prompt, row.get(args.system_column))
        mapped = {name: row[name] for name in kept} | {"prompt": prompt, "privileged_context": context}
        mapped |= {to: row[name] for to, name in given.items()}
        return mapped | {"golden_response": response or None} if responses else mapped

    if as_conversation:
        with reading(source):
            first = next(iter(dataset), {}).get(args.prompt_column)
        if isinstance(first, str):
            tell(
                "Each plain-text prompt becomes the user's turn of a conversation; to leave it as it is: --prompt_as "
                "text."
            )
    how = {"remove_columns": columns}
    if isinstance(dataset, Dataset):
        folders = {os.path.dirname(file["filename"]) for file in dataset.cache_files}
        how |= {"desc": "Mapping columns", "keep_in_memory": not all(os.access(f, os.W_OK) for f in folders)}
    with reading(source):
        mapped = dataset.map(convert, **how)
    renamed = [f"prompt from column {args.prompt_column!r}"] if args.prompt_column != "prompt" else []
    if contexts and contexts != ["privileged_context"]:
        renamed.append(f"privileged_context from {' or '.join(repr(name) for name in contexts)}")
    mapped.info.dataset_name = "; ".join([source, *renamed])
    return mapped


def _conversation(prompt: Any, system: Any) -> Any:
    """The prompt with a text as the user's turn, and with the system message, if there is one, before it."""
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    return [{"role": "system", "content": system}, *prompt] if system and isinstance(prompt, list) else prompt


def _columns(dataset: AnyDataset, source: str) -> list[str]:
    """Its columns; those of a stream may be unknown before it is read."""
    with reading(source):
        return dataset.column_names or list(next(iter(dataset)))


def _check_template(template: Template) -> None:
    names = set(template.get_identifiers())
    if not template.is_valid() or "output_text" not in names or names - {"output_text", "orig_content"}:
        raise ValueError(
            f"--demonstration_template {template.template!r}: $output_text is needed, $orig_content is allowed, "
            "nothing else; a literal dollar is written $$."
        )


def _last(prompt: Any) -> Any:
    return prompt[-1] if isinstance(prompt, list) and prompt else prompt


def _text(value: Any) -> str:
    """A demonstration or a message as text: a string, messages, or a list of either, joined by newlines. None, and
    messages without text, are empty."""
    if isinstance(value, list):
        return "\n".join(_text(part) for part in value)
    if isinstance(value, dict):
        try:
            return message_text(value.get("content"))
        except TypeError:
            return ""
    return "" if value is None else str(value)
