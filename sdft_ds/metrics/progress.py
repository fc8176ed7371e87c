"""Progress bar and log lines in the terminal: loss, completion length and seconds per phase, on rank 0."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sdft_ds.metrics.meters import METRICS

PHASES = ("rollout", "feedback", "teacher", "student", "optimizer")
LEAST_BAR = 12  # columns
BAR = "Training {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class TrainingBar(tqdm):
    """tqdm's bar, with as many parts of the last log line as leave room for the bar."""

    parts: tuple[str, ...] = ()

    def __init__(self, total: int, initial: int):
        super().__init__(total=total, initial=initial, dynamic_ncols=True, bar_format=BAR)

    @property
    def format_dict(self) -> dict[str, Any]:
        values = super().format_dict
        columns = values["ncols"] or shutil.get_terminal_size().columns
        without = self.format_meter(**{**values, "ncols": None, "bar_format": BAR.replace("{bar}", ""), "postfix": ""})
        return {**values, "postfix": fitting(self.parts, columns - len(without) - LEAST_BAR - len(", "))}


def fitting(parts: tuple[str, ...], columns: int) -> str:
    """The first parts that fit into as many columns."""
    return next((text for n in range(len(parts), 0, -1) if len(text := " | ".join(parts[:n])) <= columns), "")


class TrainingProgress(ProgressCallback):
    """transformers' progress bar, with a short summary instead of a dictionary for every log line. A resumed run's bar
    starts at the current step.

    The bar is there from the first epoch to the end of training, so that no other callback's first or last lines break
    it up: it has to be the first of the callbacks. close: after an error.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is None:
            self.training_bar = TrainingBar(state.max_steps, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.parts = summary(logs)
            self.training_bar.refresh()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None


@contextmanager
def warnings_below_bars() -> Iterator[None]:
    """Within the block a warning is written on a line of its own, not after an open progress bar on the bar's line."""
    before = warnings.formatwarning

    def format_warning(*args: Any, **kwargs: Any) -> str:
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.clear()
        return before(*args, **kwargs)

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = before


class LogLines(PrinterCallback):
    """Replaces transformers' printer when there is no bar: one short line per log, on rank 0 only."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step} of {state.max_steps}: {' | '.join(summary(logs))}", flush=True)
        elif state.is_world_process_zero:
            super().on_log(args, state, control, logs, **kwargs)


def summary(logs: dict[str, float]) -> tuple[str, ...]:
    """Parts of one log line, most important first: `loss 0.0213`, `12.4 tokens`, `1.8 s/step`, `rollout 0.9 teacher
    0.3 student 0.6`."""
    seconds = {phase: logs[f"seconds/{phase}"] for phase in PHASES if f"seconds/{phase}" in logs}
    length = (f"{logs['completions/mean_length']:.1f} tokens",) if "completions/mean_length" in logs else ()
    phases = " ".join(f"{phase} {value:.2g}" for phase, value in seconds.items())
    return (f"loss {logs['loss']:.4f}", *length, f"{sum(seconds.values()):.2g} s/step", phases)


class TimeReport(TrainerCallback):
    """Prints the share of time per phase at the end of a run."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and (report := time_report(state.log_history)):
            print(report, flush=True)


def time_report(log_history: list[dict[str, float]]) -> str:
    """`Time: rollout 52 %, teacher 11 %, student 30 %, optimizer 7 %.`, from the log; empty if nothing was logged."""
    totals = phase_seconds(log_history)
    whole = sum(totals.values())
    if not whole:
        return ""
    return "Time: " + ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in totals.items()) + "."


def phase_seconds(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Total seconds of the run in each phase; a log line holds seconds per step since the previous line."""
    logged = {name for log in log_history for name in log}
    phases = [p for p in PHASES if f"seconds/{p}" in logged or not METRICS[f"seconds/{p}"].optional]
    totals, last = dict.fromkeys(phases, 0.0), 0
    for log in log_history:
        if any(f"seconds/{phase}" in log for phase in phases):
            for phase in phases:
                totals[phase] += log.get(f"seconds/{phase}", 0.0) * (log["step"] - last)
            last = log["step"]
    return totals
