"""Progress bar and log lines in the terminal: loss, completion length and seconds per phase, on rank 0."""

from typing import Any

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


class TrainingProgress(ProgressCallback):
    """transformers' progress bar, with a short summary instead of a dictionary for every log line. A resumed run's bar
    starts at the current step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.refresh()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(summary(logs))


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
            print(f"step {state.global_step} of {state.max_steps}: {summary(logs)}", flush=True)
        elif state.is_world_process_zero:
            super().on_log(args, state, control, logs, **kwargs)


def summary(logs: dict[str, float]) -> str:
    """Summary of one log line, e.g. `loss 0.0213 | 12.4 tokens | s/step: rollout 0.9 teacher 0.3 student 0.6`."""
    seconds = " ".join(f"{phase} {logs[f'seconds/{phase}']:.2g}" for phase in PHASES if f"seconds/{phase}" in logs)
    length = f" | {logs['completions/mean_length']:.1f} tokens" if "completions/mean_length" in logs else ""
    return f"loss {logs['loss']:.4f}{length} | s/step: {seconds}"


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
