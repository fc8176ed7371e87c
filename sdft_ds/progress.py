"""What a person sees while it trains: one bar on rank 0 with the loss, the completions' length and where time goes."""

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

PHASES = ("rollout", "teacher", "student")


class TrainingProgress(ProgressCallback):
    """transformers' bar, with the figures that matter beside it instead of a dictionary for every log line."""

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


def summary(logs: dict[str, float]) -> str:
    """One log line in short, e.g. `loss 0.0213 | 12.4 tokens | s/step: rollout 0.9 teacher 0.3 student 0.6`."""
    seconds = " ".join(f"{phase} {logs[f'seconds/{phase}']:.2g}" for phase in PHASES if f"seconds/{phase}" in logs)
    length = f" | {logs['completions/mean_length']:.1f} tokens" if "completions/mean_length" in logs else ""
    return f"loss {logs['loss']:.4f}{length} | s/step: {seconds}"
