"""Collects a preview: the first rows in detail, statistics of the full data set, and notes on both."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import RowError, example_from_row
from sdft_ds.data.validation import Problems
from sdft_ds.metrics.run_folder import Completion
from sdft_ds.preview.row import Look, Looker
from sdft_ds.preview.spans import Sample, TextSpan, prompts_in_pieces, sample
from sdft_ds.preview.statistics import Statistics


@dataclass
class ShownRow:
    """One of the first rows. sample: None if the row cannot be used. scored: its rollout, with --score."""

    look: Look
    student: list[TextSpan]
    teacher: list[TextSpan]
    sample: Sample | None
    scored: Completion | None = None


@dataclass
class Preview:
    """limits: maximum prompt tokens of `student` and `teacher`; None: no limit. facts, notes: for the header."""

    args: SDFTConfig
    limits: dict[str, int | None]
    rows: list[ShownRow]
    statistics: Statistics
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    golden: dict[int, str] = field(default_factory=dict)  # golden response of the rows shown that have one
    verdict: list[str] = field(default_factory=list)  # whether this teacher can teach, with --score

    @property
    def used(self) -> dict[int, ShownRow]:
        """The rows shown that training uses, by index."""
        return {shown.look.index: shown for shown in self.rows if shown.look.taken}


def preview(rows: Iterable[dict[str, Any]], builder: PromptBuilder, args: SDFTConfig, shown: int) -> Preview:
    """Validates every row and splits the first `shown` into spans.

    As in training, an invalid row raises RowError, or is skipped with bad_rows='skip'. Raises ValueError if no row is
    left.
    """
    looker, statistics, first, bad, problems = Looker(builder), Statistics(args.truncation), [], [], Problems()
    golden = {}
    for index, row in enumerate(rows):
        try:
            look = looker.look(example_from_row(row, index, builder.context_optional), index)
        except RowError as error:
            if args.bad_rows == "error":
                raise
            bad.append(str(error))
            continue
        statistics.add(look)
        problems.add(builder.problems(look.taken or look.uncut), index)
        if len(first) < shown:
            student, teacher = prompts_in_pieces(builder, look)
            used = look.taken is not None
            said = sample(look, builder.tokenizer, args.loss_mask, args.max_completion_length) if used else None
            first.append(ShownRow(look, student, teacher, said))
            if isinstance(row.get("golden_response"), str):
                golden[index] = row["golden_response"]
    if not statistics.rows:
        raise ValueError("The data set is empty.")
    limits = {"student": builder.max_prompt_length, "teacher": builder.max_teacher_prompt_length}
    notes = [f"{len(bad)} invalid rows are skipped. The first: {bad[0]}"] if bad else []
    notes += problems.told(statistics.rows).values()
    return Preview(args, limits, first, statistics, notes=notes, golden=golden)
