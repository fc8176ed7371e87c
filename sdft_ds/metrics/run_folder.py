"""Reads a run folder: the logs of a run, in the formats specified here for their writers.

metrics.jsonl               one object per log line: {"step": int, "epoch": float, "time": Unix seconds, name: number}.
                            Names and units as in meters.METRICS, and transformers' loss, grad_norm, learning_rate,
                            eval_*. NaN and Infinity as Python's json writes them. Lines of one step are merged, the
                            later value wins; a line whose step is smaller than the previous one's comes from a resume,
                            and what was logged beyond that step before it is discarded.
completions/step-N.parquet  a row per logged completion of step N, with the columns of `Completion`.
evaluations.jsonl           {"step": int, "task": str, "rows": int, measure: number, ...}, e.g. measure accuracy or
                            kl_to_start; the last line for a (step, task) wins.
run.json                    {"config": {...}, "versions": {...}, "environment": {...}, "model": str,
                            "quantization": {...} of the model's weights or null,
                            "method": "sdft" | "sdpo" | "sft", "started": Unix seconds, "finished": Unix seconds or
                            null}

Any of them may be missing. A line or a file that was truncated mid-write is skipped and reported in `Run.notes`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

COMPLETIONS = re.compile(r"step-(\d+)\.parquet")


@dataclass(frozen=True)
class Completion:
    """One completion of T tokens: tokens, divergence, student_top and teacher_top have T entries each.

    divergence: nats per token, None for a token that is excluded from the loss. student_top, teacher_top: the top-5
    tokens of either distribution at that position, as [{"token": str, "p": float}, ...].
    """

    step: int
    prompt: str
    teacher_prompt: str
    completion: str
    length: int
    truncated: bool
    divergence_mean: float | None
    tokens: list[str]
    divergence: list[float | None]
    student_top: list[list[dict[str, Any]]]
    teacher_top: list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """Contents of a run folder. log: one dict per logged step, in order. completions: step -> (file, row count)."""

    folder: Path
    log: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    about: dict[str, Any]
    completions: dict[int, tuple[Path, int]]
    notes: list[str]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a metric, including NaN and infinities."""
        logged = [(line["step"], line[name]) for line in self.log if isinstance(line.get(name), int | float)]
        return [step for step, _ in logged], [float(value) for _, value in logged]

    def metrics(self) -> list[str]:
        """The names of all logged numbers, in order of first appearance."""
        names = {name: None for line in self.log for name, value in line.items() if isinstance(value, int | float)}
        return [name for name in names if name not in ("step", "epoch", "time")]

    def lengths(self) -> tuple[list[int], list[bool]]:
        """(length in tokens, truncated) of every logged completion."""
        tables = [parquet.read_table(path, columns=["length", "truncated"]) for path, _ in self.completions.values()]
        rows = [row for table in tables for row in table.to_pylist()]
        return [row["length"] for row in rows], [row["truncated"] for row in rows]

    def completions_of(self, step: int, most: int) -> list[Completion]:
        """The first `most` completions of a step."""
        columns = [field.name for field in fields(Completion)]
        table = parquet.read_table(self.completions[step][0], columns=columns).slice(0, most)
        return [Completion(**row) for row in table.to_pylist()]


def read(folder: str | Path) -> Run:
    """Reads a run folder. Raises ValueError if it holds none of the four."""
    folder, notes = Path(folder), []
    run = Run(
        folder=folder,
        log=_joined(_lines(folder / "metrics.jsonl", notes)),
        evaluations=list({(e["step"], e["task"]): e for e in _lines(folder / "evaluations.jsonl", notes)}.values()),
        about=_object(folder / "run.json", notes),
        completions=_completions(folder / "completions", notes),
        notes=notes,
    )
    if not (run.log or run.evaluations or run.about or run.completions):
        raise ValueError(
            f"{folder} is not the folder of a run: it has no metrics.jsonl, completions, evaluations.jsonl or "
            "run.json. Name the output_dir of a run."
        )
    return run


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a kill can leave a partial line at its end, or after a resume in its middle."""
    if not path.exists():
        return
    bad = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} broken {'line was' if bad == 1 else 'lines were'} skipped.")


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        notes.append(f"{path.name} is damaged and was skipped.")
        return {}


def _joined(lines: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for line in lines:
        while log and log[-1]["step"] > line["step"]:
            log.pop()
        if log and log[-1]["step"] == line["step"]:
            log[-1] |= line
        else:
            log.append(line)
    return log


def _completions(folder: Path, notes: list[str]) -> dict[int, tuple[Path, int]]:
    found = {}
    for path in folder.glob("step-*.parquet"):
        try:
            rows = parquet.read_metadata(path).num_rows
        except pyarrow.ArrowInvalid:
            notes.append(f"{path.name} is damaged and was skipped.")
            continue
        if named := COMPLETIONS.fullmatch(path.name):
            found[int(named[1])] = (path, rows)
    return dict(sorted(found.items()))
