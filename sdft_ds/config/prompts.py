"""Settings of rows and prompts: length limits, invalid rows, shuffling and packing."""

from dataclasses import dataclass
from typing import Any, Literal

from sdft_ds.config.fields import (
    ANOTHER_RUN,
    FREE,
    at_least,
    positive,
    setting,
)
from sdft_ds.data.validation import BadRows


@dataclass
class PromptSettings:
    max_prompt_length: int | None = setting(
        512, "Maximum tokens of a student's prompt. None: no limit.", valid=positive(), resume=FREE, card=True
    )
    max_teacher_prompt_length: int | None = setting(
        None,
        "Maximum tokens of a teacher's prompt. Unset: the model's context minus max_completion_length.",
        valid=positive(),
        resume=FREE,
    )
    truncation: Literal["truncate", "drop", "error"] = setting(
        "truncate",
        "A prompt over its limit: cut the user's text (never the template), counted and warned about; drop the row; "
        "or stop with an error.",
        resume=FREE,
        card=True,
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error",
        "A row whose contents cannot be used: stop with an error, or skip it, counted and warned about.",
        resume=FREE,
    )
    max_bad_rows: int = setting(
        100,
        "Maximum rows that bad_rows=skip skips in a data set, or in a pass of a stream.",
        valid=at_least(0),
        only_with=("bad_rows=skip",),
        resume=FREE,
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments (JSON) of the chat template, for example to switch thinking off.", resume=FREE
    )
    padding_free: bool | None = setting(
        None,
        "Pack the student's rows into one sequence instead of padding them to the longest. Unset: with flash "
        "attention, and elsewhere where it costs less.",
        resume=FREE,
    )
    shuffle_dataset: bool = setting(True, "Reshuffle the training rows in every epoch.", resume=ANOTHER_RUN)

    @property
    def bad_rows_policy(self) -> BadRows:
        """How invalid rows are handled."""
        return BadRows(self.bad_rows, self.max_bad_rows)
