"""Collapse guard: tells when rollouts degenerate, with the step and the likely cause, and can end the run.

A student whose teacher follows it (live, or a fast EMA) can agree with anything. The loss is then 0 while every
completion repeats one token, so the guard looks at what was sampled, in the metrics of each log line with a loss:
these are the same on all ranks.
"""

import warnings
from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig

REPEATED = "completions/repeated_ratio"
EMPTY = "completions/empty_ratio"
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
ENTROPY = "entropy/student"


@dataclass(frozen=True)
class Limit:
    """A metric is out of its range above `most` or below `least`; words: what that means."""

    metric: str
    words: str
    most: float = float("inf")
    least: float = float("-inf")

    def is_passed(self, logs: dict[str, float]) -> bool:
        return not self.least <= logs.get(self.metric, self.least) <= self.most


# Measured on the demo: a live teacher at a learning rate of 1e-2 reaches 0.9 repeated and an entropy of 0; runs that
# learn stay below 0.05 repeated, and above 0.1 nats.
LIMITS = (
    Limit(REPEATED, "of the completions' 4-grams repeat earlier ones of the same completion", most=0.5),
    Limit(EMPTY, "of the completions end at once", most=0.5),
    Limit(ENTROPY, "nats/token is the student's entropy: it samples one answer only", least=1e-3),
)
LONGER = 4.0  # times the first log line's mean length, with more than half of the completions cut
PATIENCE = 2  # log lines in a row


class CollapseGuard(TrainerCallback):
    """Warns once, and with stop_on_collapse saves a checkpoint and ends the run."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.first_length: float | None = None
        self.in_a_row = 0
        self.told = False

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.reset()

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: object
    ) -> None:
        if "loss" not in logs or LENGTH not in logs:
            return
        if self.first_length is None:
            self.first_length = logs[LENGTH]
        signs = self._signs(logs)
        self.in_a_row = self.in_a_row + 1 if signs else 0
        if self.in_a_row < PATIENCE or self.told:
            return
        self.told = True
        remedy = (
            "it was saved, and the run ends here" if args.stop_on_collapse else "stop_on_collapse=True would end it"
        )
        warnings.warn(
            f"The run has collapsed by step {state.global_step}: {'; '.join(signs)}. {_cause(args)} The weights are "
            f"likely lost since the last checkpoint before it; {remedy}.",
            stacklevel=2,
        )
        if args.stop_on_collapse:
            control.should_save = control.should_training_stop = True

    def _signs(self, logs: dict[str, float]) -> list[str]:
        signs = [f"{logs[limit.metric]:.2g} {limit.words}" for limit in LIMITS if limit.is_passed(logs)]
        if logs[LENGTH] > LONGER * self.first_length and logs.get(CLIPPED, 0.0) > 0.5:
            signs.append(f"completions have grown from {self.first_length:.0f} to {logs[LENGTH]:.0f} tokens")
        return signs


def _cause(args: SDFTConfig) -> str:
    if args.teacher_model_kind == "live":
        follows = "a live teacher follows the student wherever it goes: set teacher_model_kind=base, or ema"
    elif args.teacher_model_kind == "ema":
        follows = f"an EMA teacher with teacher_update_rate={args.teacher_update_rate} follows the student: lower it"
    else:
        follows = "the teacher stands still, so the steps are too large"
    return f"Likely cause: {follows}; learning_rate={args.learning_rate:g} may be too high."
