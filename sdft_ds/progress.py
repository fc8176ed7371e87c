"""What a person sees while it trains: one bar on rank 0 with the loss, the completions' length and where time goes."""

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

PHASES = ("rollout", "teacher", "student", "optimizer")


class TrainingProgress(ProgressCallback):
    """transformers' bar, with the figures that matter beside it instead of a dictionary for every log line. That of a
    resumed run begins where the run stands."""

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
    """In place of transformers' printer, where there is no bar: one short line for each log, of one rank alone."""

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
    """One log line in short, e.g. `loss 0.0213 | 12.4 tokens | s/step: rollout 0.9 teacher 0.3 student 0.6`."""
    seconds = " ".join(f"{phase} {logs[f'seconds/{phase}']:.2g}" for phase in PHASES if f"seconds/{phase}" in logs)
    length = f" | {logs['completions/mean_length']:.1f} tokens" if "completions/mean_length" in logs else ""
    return f"loss {logs['loss']:.4f}{length} | s/step: {seconds}"


class TimeReport(TrainerCallback):
    """Says at the end of a run where its time went."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and (report := time_report(state.log_history)):
            print(report, flush=True)


def time_report(log_history: list[dict[str, float]]) -> str:
    """`Time: rollout 52 %, teacher 11 %, student 30 %, optimizer 7 %.`, of what was logged; empty if nothing was."""
    totals = phase_seconds(log_history)
    whole = sum(totals.values())
    if not whole:
        return ""
    return "Time: " + ", ".join(f"{phase} {100 * seconds / whole:.0f} %" for phase, seconds in totals.items()) + "."


def phase_seconds(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of the whole run in each phase: a log line tells those per step since the line before it."""
    totals, last = dict.fromkeys(PHASES, 0.0), 0
    for log in log_history:
        if any(f"seconds/{phase}" in log for phase in PHASES):
            for phase in PHASES:
                totals[phase] += log.get(f"seconds/{phase}", 0.0) * (log["step"] - last)
            last = log["step"]
    return totals
