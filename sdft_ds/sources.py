"""Files, folders and hub data sets -> splits with the two columns that the trainer reads."""

from pathlib import Path
from string import Template
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk

from sdft_ds.arguments import ScriptArguments
from sdft_ds.rows import check_columns, message_text

LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_splits(args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """The splits that the arguments name, as they are stored.

    A single file is the training split; in a folder of files, a file's name says which split it belongs to where it
    contains the name of the test split. Raises ValueError or FileNotFoundError naming the path and what is possible.
    """
    if args.dataset_path is not None and args.dataset_name is not None:
        raise ValueError("--dataset_path and --dataset_name are both set: give one of them.")
    if args.dataset_path is None:
        splits = load_dataset(args.dataset_name, name=args.dataset_config, streaming=args.dataset_streaming)
    else:
        splits = _load_path(Path(args.dataset_path), args)
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


def _load_path(path: Path, args: ScriptArguments) -> Dataset | DatasetDict:
    if not path.exists():
        raise FileNotFoundError(f"--dataset_path {path} does not exist.")
    if path.is_file():
        return _load_files({args.dataset_train_split: [path]}, path, args.dataset_streaming)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return load_from_disk(str(path))
    files = sorted(file for file in path.iterdir() if file.suffix in LOADERS)
    if not files:
        raise ValueError(f"--dataset_path {path} holds no {', '.join(LOADERS)} file and is no save_to_disk folder.")
    test = [file for file in files if args.dataset_test_split in file.stem]
    train = [file for file in files if file not in test]
    by_split = {args.dataset_train_split: train, args.dataset_test_split: test}
    return _load_files(by_split, path, args.dataset_streaming)


def _load_files(files: dict[str, list[Path]], path: Path, streaming: bool) -> DatasetDict | IterableDatasetDict:
    files = {split: paths for split, paths in files.items() if paths}
    suffixes = {file.suffix for paths in files.values() for file in paths}
    if len(suffixes) > 1 or not suffixes <= set(LOADERS):
        raise ValueError(
            f"--dataset_path {path}: files of one kind out of {', '.join(LOADERS)} are needed, found "
            f"{', '.join(sorted(suffixes))}."
        )
    paths = {split: [str(file) for file in paths] for split, paths in files.items()}
    return load_dataset(LOADERS[suffixes.pop()], data_files=paths, streaming=streaming)


def map_columns(dataset: Dataset | IterableDataset, args: ScriptArguments) -> Dataset | IterableDataset:
    """The data set with the columns `prompt` and `privileged_context` only; for supervised fine-tuning with
    `golden_response` besides, if it is there.

    The context is the row's own; where it has none, the demonstration template around its golden response.
    """
    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know them before it is read
    for flag in ("prompt_column", "system_column"):
        name = getattr(args, flag)
        if name is not None and name not in columns:
            raise ValueError(f"--{flag}={name}, but the data set has the columns {', '.join(columns)}.")
    if args.privileged_context_column not in columns and args.golden_response_column not in columns:
        check_columns(["prompt", *(name for name in columns if name != "privileged_context")])
    template = Template(args.demonstration_template)
    _check_template(template)

    responses = args.method == "sft" and args.golden_response_column in columns

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[args.prompt_column]
        context = row.get(args.privileged_context_column)
        response = row.get(args.golden_response_column)
        if context is None and response is not None:
            context = template.substitute(output_text=_response_text(response), orig_content=_prompt_text(prompt))
        if args.system_column is not None:
            system = {"role": "system", "content": row[args.system_column]}
            prompt = [system, {"role": "user", "content": prompt}] if isinstance(prompt, str) else [system, *prompt]
        mapped = {"prompt": prompt, "privileged_context": context}
        return mapped | {"golden_response": response and _response_text(response)} if responses else mapped

    if isinstance(dataset, IterableDataset):
        return dataset.map(convert, remove_columns=columns)
    return dataset.map(convert, remove_columns=columns, desc="Mapping columns")


def _check_template(template: Template) -> None:
    names = set(template.get_identifiers())
    if not template.is_valid() or "output_text" not in names or names - {"output_text", "orig_content"}:
        raise ValueError(
            f"--demonstration_template {template.template!r}: $output_text is needed, $orig_content is allowed, "
            "nothing else; a literal dollar is written $$."
        )


def _response_text(response: Any) -> str:
    """A demonstration as text: a string, messages, or a list of either, joined by newlines."""
    if isinstance(response, list):
        return "\n".join(_response_text(part) for part in response)
    return message_text(response["content"]) if isinstance(response, dict) else str(response)


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else message_text(prompt[-1]["content"])
