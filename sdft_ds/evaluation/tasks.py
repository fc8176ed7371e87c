"""Reads and validates task files (`--eval_tasks`, `--retention_file`): prompts with reference answers."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdft_ds.data.rows import Example, Prompt, checked_prompt, example_from_row
from sdft_ds.evaluation import scorers

RETENTION = "retention"


@dataclass(frozen=True)
class TaskRow:
    """A question. answer: the reference for `scorer`; may be None in the retention set only. in_context: the question
    with its privileged context, which the teacher check asks; None without one. number: its row in the file."""

    prompt: Prompt
    answer: Any
    scorer: str
    in_context: Example | None = None
    number: int | None = None

    def as_turn(self) -> "TaskRow":
        if not isinstance(self.prompt, str):
            return self
        turn = [{"role": "user", "content": self.prompt}]
        in_context = None if self.in_context is None else replace(self.in_context, prompt=turn)
        return replace(self, prompt=turn, in_context=in_context)

    def score(self, completion: str) -> bool | None:
        """Whether the completion is correct; None without an answer."""
        return None if self.answer is None else scorers.score(self.scorer, completion, self.answer)


@dataclass(frozen=True)
class Task:
    name: str
    rows: list[TaskRow]

    def as_turns(self) -> "Task":
        """The task with its plain-text questions as the user's turn of a conversation, as training reads its rows."""
        return Task(self.name, [row.as_turn() for row in self.rows])

    def with_contexts(self) -> "Task":
        """The task with only those rows that have a context."""
        return Task(self.name, [row for row in self.rows if row.in_context is not None])


def read_tasks(values: list[str], retention: str | None = None, limit: int | None = None) -> list[Task]:
    """The tasks of `--eval_tasks`, then that of `--retention_file`; the first `limit` rows of each.

    A value is `FILE`, `NAME=FILE`, `FILE:SCORER` or `NAME=FILE:SCORER`; the name defaults to the file's stem. A file
    is JSON Lines with `prompt` (text, or a conversation that ends with a user turn), `answer`, and optionally
    `system`, `scorer`, which overrides the value's (the default is `exact`), and `privileged_context` or
    `teacher_prompt`, as in training. The retention task is named `retention`, and its rows need no answer. Raises
    ValueError or FileNotFoundError naming file, row and remedy.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"eval_task_rows must be at least 1, not {limit}.")
    tasks = [_read(value, limit) for value in values]
    if retention is not None:
        tasks.append(_read(f"{RETENTION}={retention}", limit, answers_needed=False))
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two sets of questions are named {name!r}: name one by NAME=FILE.")
    return tasks


def _read(value: str, limit: int | None, answers_needed: bool = True) -> Task:
    name, path, scorer = _parts(value)
    rows = []
    for index, text in _lines(path, limit):
        try:
            rows.append(_row(text, index, scorer, answers_needed))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return Task(name, rows)


def _parts(value: str) -> tuple[str, Path, str]:
    """Parses a value into (name, file, scorer)."""
    named = re.fullmatch(r"([\w.-]+)=(.+)", value)
    name, rest = named.groups() if named else (None, value)
    file, _, scorer = rest.rpartition(":")
    if not file or (scorer not in scorers.SCORERS and Path(rest).exists()):
        file, scorer = rest, "exact"
    if scorer not in scorers.SCORERS:
        raise ValueError(f"{value}: there is no scorer {scorer!r}; there are {', '.join(scorers.SCORERS)}.")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{value}: the file {file} does not exist.")
    return name or Path(file).stem, Path(file), scorer


def _lines(path: Path, limit: int | None) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for index, text in enumerate(line for line in file if line.strip()):
            if index == limit:
                return
            yield index, text


def _row(text: str, index: int, scorer: str, answer_needed: bool) -> TaskRow:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"Row {index} is not JSON ({error}); expected JSON Lines, one object per line.") from None
    if not isinstance(row, dict) or "prompt" not in row:
        found = f", found {', '.join(row)}" if isinstance(row, dict) else ""
        raise ValueError(f"Row {index}: expected an object with 'prompt' and 'answer'{found}.")
    prompt = checked_prompt(row["prompt"], index)
    if row.get("system") is not None:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt = [{"role": "system", "content": row["system"]}, *turns]
    told = {name: row[name] for name in ("privileged_context", "teacher_prompt") if row.get(name)}
    in_context = example_from_row({"prompt": prompt, **told}, index) if told else None
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    made = TaskRow(prompt, answer, row.get("scorer") or scorer, in_context, index)
    if made.answer is None and answer_needed:
        raise ValueError(f"Row {index}, column 'answer': found nothing; without it an answer cannot be scored.")
    try:
        made.score("")
    except ValueError as error:
        raise ValueError(f"Row {index}, column 'answer': {error} (scorer {made.scorer}).") from None
    return made
