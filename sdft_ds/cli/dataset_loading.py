"""The data sets of the command line: training and evaluation rows, and anchors."""

from collections.abc import Callable
from importlib.resources import files

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.data.loading import splits
from sdft_ds.data.loading.file_kinds import display
from sdft_ds.data.loading.formats import COLUMN_NAMES, ROLES
from sdft_ds.data.loading.mapping import AnyDataset, RowReader
from sdft_ds.data.validation import ROW_NUMBER

EVERYDAY = files("sdft_ds.data") / "everyday_prompts.jsonl"

Tell = Callable[[str], None]


def silent(text: str) -> None:
    pass


def load(
    args: ScriptArguments, evaluates: bool, seed: int, has_chat_template: bool = False, tell: Tell = silent
) -> tuple[AnyDataset, Dataset | None]:
    """Returns (training rows, evaluation rows or None unless `evaluates`), with mapped columns.

    tell: called with notes on the files, the format and the column mapping.

    Raises ValueError or FileNotFoundError, naming the path or the split and the alternatives.
    """
    if args.eval_fraction is not None and not evaluates:
        raise ValueError("--eval_fraction has no effect without --eval_strategy: set it, steps or epoch.")
    reader = row_reader(args, has_chat_template)
    stored = load_splits(args, tell)
    with splits.lines_named(args.dataset_path or [], f"dataset_path {args.source}"):
        train = reader.read(stored[args.dataset_train_split], args.source, tell)
    if not evaluates:
        return train, None
    if args.eval_fraction is not None:
        return hold_out(train, args.eval_fraction, seed)
    if args.dataset_test_split not in stored:
        raise ValueError(
            f"eval_strategy needs the split {args.dataset_test_split!r}; the data set has {', '.join(stored)}. Set "
            "--dataset_test_split, or --eval_fraction."
        )
    with splits.lines_named(args.dataset_path or [], f"dataset_path {args.source}"):
        test = reader.read(stored[args.dataset_test_split], args.source)
    if isinstance(test, IterableDataset):  # it is read again in every evaluation
        info, test = test.info, Dataset.from_list(list(test), on_mixed_types="use_json")
        test.info.dataset_name = f"{info.dataset_name}, split {args.dataset_test_split}"
    return train, test


def load_anchors(args: ScriptArguments, has_chat_template: bool = False, tell: Tell = silent) -> Dataset | None:
    """The anchors, with the column `prompt` and for SFT `golden_response`; None without --anchor_path. Raises what
    `load` raises."""
    if args.anchor_path in (None, ["none"]):
        return None
    paths = [str(EVERYDAY)] if args.anchor_path == ["everyday"] else args.anchor_path
    source = f"anchor_path {display(paths)}"
    train = args.dataset_train_split
    stored = splits.from_paths(paths, source, train, args.dataset_test_split, False, _row_columns(args), tell)
    with splits.lines_named(paths, source):
        return row_reader(args, has_chat_template).read_anchors(_with_train_split(stored, train)[train], source, tell)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Returns (the other rows, a held-out fraction); messages about a row keep its number in `dataset`."""
    if len(dataset) < 2:
        raise ValueError(f"--eval_fraction={fraction} of {len(dataset)} rows leaves nothing to train on.")
    numbered = dataset.add_column(ROW_NUMBER, list(range(len(dataset))))
    parts = numbered.train_test_split(max(1, round(fraction * len(dataset))), seed=seed)
    return parts["train"], parts["test"]


def load_splits(args: ScriptArguments, tell: Tell = silent) -> DatasetDict | IterableDatasetDict:
    """The splits of the given data set, as stored. Raises ValueError or FileNotFoundError, naming the path and the
    alternatives."""
    train, test, streaming = args.dataset_train_split, args.dataset_test_split, args.dataset_streaming
    if args.dataset_path is None:
        stored = splits.from_hub(args.dataset_name, args.dataset_config, args.dataset_revision, streaming)
    else:
        where = f"dataset_path {args.source}"
        stored = splits.from_paths(args.dataset_path, where, train, test, streaming, _row_columns(args), tell)
    stored = _with_train_split(stored, train)
    if streaming and isinstance(stored, DatasetDict):  # a save_to_disk folder
        stored = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in stored.items()})
    return stored


def _with_train_split(stored: Dataset | DatasetDict | IterableDatasetDict, train: str) -> DatasetDict:
    found = DatasetDict({train: stored}) if isinstance(stored, Dataset) else stored
    if train not in found:
        raise ValueError(f"The data set has the splits {', '.join(found)}, not {train!r}: set --dataset_train_split.")
    return found


def row_reader(args: ScriptArguments, has_chat_template: bool) -> RowReader:
    """How its data sets are read."""
    return RowReader(
        format=args.dataset_format,
        columns=_given_columns(args),
        demonstration_template=args.demonstration_template,
        as_user=args.reads_prompts_as_turns(has_chat_template),
        keep_response=args.method == "sft" or args.makes_contexts,
        response_teaches=args.method != "sdpo",  # a golden response is for the rewards; a context is feedback
        context_optional=args.makes_contexts,
    )


def _given_columns(args: ScriptArguments) -> dict[str, str]:
    given = {role: getattr(args, f"{role}_column") for role in ROLES}
    return {role: column for role, column in given.items() if column is not None}


def _row_columns(args: ScriptArguments) -> set[str]:
    return COLUMN_NAMES | {*_given_columns(args).values()}
