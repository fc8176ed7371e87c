"""What a preview shows, gathered: the first rows, the whole data set in numbers, and what to know about both."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sdft_ds.config import SDFTConfig
from sdft_ds.preview.look import Look, Looker
from sdft_ds.preview.pieces import Piece, Sample, prompts_in_pieces, sample
from sdft_ds.preview.statistics import Statistics
from sdft_ds.prompts import PromptBuilder
from sdft_ds.report.run_folder import Completion
from sdft_ds.rows import RowError, example_from_row
from sdft_ds.screening import Problems


@dataclass
class ShownRow:
    """One of the first rows. sample: None where the row cannot be used. scored: a rollout, where one was made."""

    look: Look
    student: list[Piece]
    teacher: list[Piece]
    sample: Sample | None
    scored: Completion | None = None


@dataclass
class Preview:
    """limits: most tokens of the prompt of `student` and `teacher`; None: none. facts, notes: for its head."""

    args: SDFTConfig
    limits: dict[str, int | None]
    rows: list[ShownRow]
    statistics: Statistics
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def preview(rows: Iterable[dict[str, Any]], builder: PromptBuilder, args: SDFTConfig, shown: int) -> Preview:
    """Looks at every row, and takes the first `shown` of them apart.

    Raises RowError for a row that is not valid, as training does, or leaves it out, as training does with
    bad_rows='skip'; ValueError where there is none.
    """
    looker, statistics, first, bad, problems = Looker(builder), Statistics(args.truncation), [], [], Problems()
    for index, row in enumerate(rows):
        try:
            look = looker.look(example_from_row(row, index), index)
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
    if not statistics.rows:
        raise ValueError("The data set is empty.")
    limits = {"student": builder.max_prompt_length, "teacher": builder.max_teacher_prompt_length}
    notes = [f"{len(bad)} bad rows are left out. The first: {bad[0]}"] if bad else []
    notes += problems.told(statistics.rows).values()
    return Preview(args, limits, first, statistics, notes=notes)
