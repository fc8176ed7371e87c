"""Data set validation: validates every row before training; invalid rows raise or are skipped (`bad_rows`).

A row is *bad* if its contents are invalid. Rows that are only too long are handled by `truncation`.
"""

import hashlib
import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset, IterableDataset

from sdft_ds.data import prompts, rows
from sdft_ds.data.prompts import PromptBuilder, PromptPair, PromptTooLong
from sdft_ds.data.rows import DataError, RowError, anchor_from_row, check_columns, demonstration_of, example_from_row
from sdft_ds.files import atomic_write

BAD_ROWS = ("error", "skip")
ROW_NUMBER = "_row"  # column with the row number in the source, for a data set that was rearranged after loading
REASONS_TOLD = 5
SHOWN_END = 60  # characters of a prompt's end in a message
NOTHING_TO_LEARN = ("text dropped", "context dropped", "same prompts")  # errors if they affect every row


@dataclass(frozen=True)
class BadRows:
    """How bad rows are handled. limit: most rows that may be skipped."""

    policy: str = "error"
    limit: int = 100


STRICT = BadRows()


@dataclass
class Problems:
    """Counts problems with the prompts of valid rows. found: problem -> (count, first row)."""

    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, problems: list[str], index: int) -> None:
        for problem in problems:
            count, first = self.found.get(problem, (0, index))
            self.found[problem] = count + 1, first

    def told(self, rows: int) -> dict[str, str]:
        """Problem -> warning message; rows: the total number of rows."""
        return {
            problem: f"{count} of {rows} rows, the first of them row {first}: {prompts.PROBLEMS[problem]}"
            for problem, (count, first) in self.found.items()
        }


@dataclass
class RowValidator:
    """Validates the rows of one data set.

    anchors: its rows have no context. reasons: one message per skipped bad row. too_long: number of rows dropped as
    too long.
    """

    where: str
    builder: PromptBuilder
    bad_rows: BadRows
    anchors: bool = False
    reasons: list[str] = field(default_factory=list)
    too_long: int = 0
    problems: Problems = field(default_factory=Problems)
    first: str | None = None  # warning about the first rendered row; "": no warning

    @property
    def leaves_out(self) -> bool:
        """Whether invalid rows may be skipped rather than only raise."""
        return self.bad_rows.policy == "skip" or self.builder.truncation == "drop"

    def accepts(self, row: dict[str, Any], index: int, lengths: bool = True) -> bool:
        """Whether row `index` is valid; if not, it is counted. lengths: also render its prompts.

        Raises DataError or PromptTooLong, depending on the policies, and DataError if bad rows exceed the limit.
        """
        try:
            if self.anchors:
                example = anchor_from_row(row, index)
            else:
                example = example_from_row(row, index, self.builder.context_optional)
            if self.builder.demonstrations:
                demonstration_of(row, example, index)
            if lengths:
                pair = self.builder.build(example, index)
                self.problems.add(self.builder.problems(pair), index)
                if self.first is None:
                    self.first = _generation_prompts(pair, index, self.builder)
        except PromptTooLong as error:
            if self.builder.truncation == "drop":
                self.too_long += 1
                return False
            if self.bad_rows.policy == "error" or self.builder.truncation == "error":
                raise PromptTooLong(f"{self.where}: {error}") from None
            self.reasons.append(str(error))
        except RowError as error:
            if self.bad_rows.policy == "error":
                raise DataError(f"{self.where}: {error} Or skip such rows: bad_rows='skip'.") from None
            self.reasons.append(str(error))
        else:
            return True
        if len(self.reasons) > self.bad_rows.limit:
            raise DataError(
                f"{self.where}: more rows than max_bad_rows={self.bad_rows.limit} cannot be used. The last: "
                f"{self.reasons[-1]}"
            )
        return False


def name_of(dataset: Dataset | IterableDataset, name: str) -> str:
    """Name of the data set in messages: the argument, with the source and split where known."""
    source, split = dataset.info.dataset_name, dataset.split
    known = [str(source)] if source else []
    known += [f"split {split}"] if split else []
    return f"{name} ({', '.join(known)})" if known else name


def _require_dataset(dataset: Any, name: str) -> None:
    """Raises DataError, with the remedy, for anything but a Dataset or IterableDataset."""
    if isinstance(dataset, Dataset | IterableDataset):
        return
    if isinstance(dataset, dict):
        splits = ", ".join(map(repr, dataset))
        remedy = f"it has {splits or 'no splits'}: give one, {name}=dataset[{next(iter(dataset), 'train')!r}]"
    elif isinstance(dataset, list | tuple):
        remedy = f"give {name}=datasets.Dataset.from_list(rows)"
    else:
        remedy = "give a datasets.Dataset, made by load_dataset or Dataset.from_list, for example"
    raise DataError(f"{name} is a {type(dataset).__name__}, not a datasets.Dataset: {remedy}.")


def validate_dataset(
    dataset: Dataset, name: str, builder: PromptBuilder, bad_rows: BadRows = STRICT, anchors: bool = False
) -> Dataset:
    """Validate every row before the first step and return the valid ones; warns with the number of skipped rows.

    anchors: rows of which only the prompt is read.

    Results for a data set on disk are stored in the cache of `datasets`. Raises DataError naming data set, split, row
    and column.
    """
    _require_dataset(dataset, name)
    where = name_of(dataset, name)
    if isinstance(dataset, IterableDataset):
        raise DataError(f"{where} is an IterableDataset: only train_dataset can be a stream.")
    if len(dataset) == 0:
        raise DataError(f"{where} is empty.")
    if anchors and "prompt" not in dataset.column_names:
        raise DataError(
            f"{where} has the columns {', '.join(dataset.column_names)}, and lacks prompt: rename a column "
            "(dataset.rename_column)."
        )
    if not anchors:
        try:
            check_columns(dataset.column_names, context_optional=builder.context_optional)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    file = _cache_file(dataset, builder, bad_rows, anchors)
    if file is not None and file.exists():
        found = json.loads(file.read_text())
    else:
        found = _look(dataset, RowValidator(where, builder, bad_rows, anchors))
        if file is not None:
            _remember(file, found)
    _tell(where, len(dataset), **found)
    left_out = set(found["left_out"])
    return dataset.select([i for i in range(len(dataset)) if i not in left_out]) if left_out else dataset


def _generation_prompts(pair: PromptPair, index: int, builder: PromptBuilder) -> str:
    """The warning if student and teacher have different generation prompts; "" if not."""
    student, teacher = map(builder.generation_prompt, (pair.student, pair.teacher))
    if student == teacher or None in (student, teacher):
        return ""
    return (
        f"after the user's text of row {index} the student's prompt ends with {student[-SHOWN_END:]!r}, the teacher's "
        f"with {teacher[-SHOWN_END:]!r}, so that both answer in different ways: set chat_template_kwargs, for the "
        "teacher alone teacher_chat_template_kwargs, such as enable_thinking, or take out of the texts what switches "
        "the chat template."
    )


def _look(dataset: Dataset, screen: RowValidator) -> dict[str, Any]:
    left_out = []
    for index, row in enumerate(datasets.utils.tqdm(dataset, desc=f"Checking {screen.where.partition(' (')[0]}")):
        if not screen.accepts(row, row.get(ROW_NUMBER, index)):
            left_out.append(index)
    cut = dict(screen.builder.counts)
    screen.builder.counts.clear()
    problems = screen.problems.found
    return {
        "left_out": left_out, "reasons": screen.reasons, "too_long": screen.too_long, "cut": cut,
        "problems": problems, "first": screen.first,
    }  # fmt: skip


def _tell(
    where: str, count: int, left_out: list[int], reasons: list[str], too_long: int, cut: dict[str, int],
    problems: dict[str, tuple[int, int]], first: str | None,
) -> None:  # fmt: skip
    """Warn about skipped rows, truncation and problems; raises DataError if no row is left, or nothing to learn."""
    if len(left_out) == count:
        why = f" Of the first bad one: {reasons[0]}" if reasons else ""
        raise DataError(
            f"{where}: all {count} rows are skipped: {too_long} are over max_prompt_length or "
            f"max_teacher_prompt_length, {len(reasons)} are bad.{why}"
        )
    if reasons:
        more = f" And {len(reasons) - REASONS_TOLD} more." if len(reasons) > REASONS_TOLD else ""
        warnings.warn(
            f"{where}: {len(reasons)} of {count} rows are invalid and skipped: "
            f"{' '.join(reasons[:REASONS_TOLD])}{more}",
            stacklevel=4,
        )
    usable = count - len(left_out)
    for problem, told in Problems(problems).told(usable).items():
        if problem in NOTHING_TO_LEARN and problems[problem][0] == usable:
            raise DataError(f"{where}: {told}")
        warnings.warn(f"{where}: {told}", stacklevel=4)
    if first:
        warnings.warn(f"{where}: {first}", stacklevel=4)
    if too_long or cut:
        warnings.warn(
            f"{where}: of {count} rows {too_long} are dropped, {cut.get('student_prompts_cut', 0)} lose the "
            f"beginning of the prompt and {cut.get('teacher_prompts_cut', 0)} the end of the context, because of "
            "max_prompt_length and max_teacher_prompt_length.",
            stacklevel=4,
        )


def _cache_file(dataset: Dataset, builder: PromptBuilder, bad_rows: BadRows, anchors: bool) -> Path | None:
    """Cache file of the results, keyed by the rows, how they are rendered, and this code. None for rows in memory,
    which are not worth caching, and for slow tokenizers, which cannot be serialized into the key."""
    if not dataset.cache_files or not datasets.is_caching_enabled() or not builder.tokenizer.is_fast:
        return None
    code = [Path(file).read_text() for file in (rows.__file__, prompts.__file__, __file__)]
    facts = [
        dataset._fingerprint,
        builder.tokenizer.backend_tokenizer.to_str(),
        builder.tokenizer.chat_template,
        builder.template,
        builder.max_prompt_length,
        builder.max_teacher_prompt_length,
        builder.truncation,
        builder.chat_template_kwargs,
        builder.teacher_chat_template_kwargs,
        builder.context_optional,
        builder.demonstrations,
        asdict(bad_rows),
        anchors,
        transformers.__version__,
        code,
    ]
    key = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "sdft_ds", f"{key}.json")


def _remember(file: Path, found: dict[str, Any]) -> None:
    """Write the cache file, atomically as several ranks may; if the disk is not writable, validation just reruns."""
    with suppress(OSError), atomic_write(file) as aside:
        aside.write_text(json.dumps(found))
