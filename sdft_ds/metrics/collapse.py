"""Collapse guard: tells when rollouts degenerate, or the retention set is forgotten, with the step and the likely
cause, and can end the run.

A student whose teacher follows it (live, or a fast EMA) can agree with anything. The loss is then 0 while every
completion repeats one token, so the guard looks at what was sampled, in the metrics of each log line with a loss, and
at the figures of the retention set (evaluation/) where they are logged. Both are the same on all ranks.
"""

import warnings
from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig

REPEATED = "completions/repeated_ratio"
EMPTY = "completions/empty_ratio"
LENGTH, CLIPPED = "completions/mean_length", "completions/clipped_ratio"
ENTROPY = "entropy/student"
KEPT, KL = "tasks/retention/accuracy", "tasks/retention/kl_to_start"


@dataclass(frozen=True)
class Limit:
    """A metric is out of its range above `most`; words: what that means."""

    metric: str
    words: str
    most: float

    def is_passed(self, logs: dict[str, float]) -> bool:
        return not logs.get(self.metric, 0.0) <= self.most


# Measured on the demo: a live teacher at a learning rate of 1e-2 reaches 0.9 repeated and an entropy of 0; runs that
# learn stay below 0.05 repeated, and above 0.1 nats.
LIMITS = (
    Limit(REPEATED, "of the completions' 4-grams repeat earlier ones of the same completion", most=0.5),
    Limit(EMPTY, "of the completions end at once", most=0.5),
)
LEAST_ENTROPY = 1e-3  # nats/token, where it has fallen tenfold: a model may be as sure of its answers from the start
LONGER = 4.0  # times the first log line's mean length, with more than half of the completions cut
PATIENCE = 2  # log lines in a row
# Of the retention set: the share of the accuracy at the start, and nats/token, for a set without answers. Runs that
# keep their answers stay below 0.3; that half of them are lost shows at 0.2 to 0.7, depending on the set.
LEAST_KEPT, MOST_KL = 0.5, 1.0


class CollapseGuard(TrainerCallback):
    """Warns once of each, and with stop_on_collapse saves a checkpoint and ends the run. held: there are anchors."""

    def __init__(self, held: bool = False) -> None:
        self.held = held
        self.reset()

    def reset(self) -> None:
        self.in_a_row = 0
        self.told: set[str] = set()

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.reset()

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: object
    ) -> None:
        if "loss" in logs and LENGTH in logs:
            signs = _signs_in_text(logs, state)
            self.in_a_row = self.in_a_row + 1 if signs else 0
            if self.in_a_row >= PATIENCE:
                lost = "The weights are likely lost since the last checkpoint before it"
                self._tell("collapsed", signs, lost, args, state, control)
        if signs := _signs_of_forgetting(logs, state):
            hold = "" if self.held else "Anchors hold a model to its start (anchor_path, or anchor_dataset). "
            kept = f"{hold}The last checkpoint before it may have kept more"
            self._tell("forgotten the retention set", signs, kept, args, state, control)

    def _tell(
        self, what: str, signs: list[str], advice: str, args: SDFTConfig, state: TrainerState, control: TrainerControl
    ) -> None:
        if what in self.told:
            return
        self.told.add(what)
        if control.should_training_stop:
            remedy = "the run was at its end"
        elif args.stop_on_collapse:
            remedy = "it was saved, and the run ends here"
            control.should_save = control.should_training_stop = True
        else:
            remedy = "stop_on_collapse=True would end it"
        warnings.warn(
            f"The run has {what} by step {state.global_step}: {'; '.join(signs)}. {_cause(args)} {advice}; {remedy}.",
            stacklevel=3,
        )


def _first(metric: str, state: TrainerState) -> float:
    """The metric's value when it was first logged, also before a resume."""
    return next(line[metric] for line in state.log_history if metric in line)


def _signs_in_text(logs: dict[str, float], state: TrainerState) -> list[str]:
    signs = [f"{logs[limit.metric]:.2g} {limit.words}" for limit in LIMITS if limit.is_passed(logs)]
    if ENTROPY in logs and logs[ENTROPY] < min(LEAST_ENTROPY, _first(ENTROPY, state) / 10):
        signs.append(f"{logs[ENTROPY]:.2g} nats/token is the student's entropy: it samples one answer only")
    first_length = _first(LENGTH, state)
    if logs[LENGTH] > LONGER * first_length and logs.get(CLIPPED, 0.0) > 0.5:
        signs.append(f"completions have grown from {first_length:.0f} to {logs[LENGTH]:.0f} tokens")
    return signs


def _signs_of_forgetting(logs: dict[str, float], state: TrainerState) -> list[str]:
    signs = []
    if KEPT in logs and logs[KEPT] < LEAST_KEPT * (start := _first(KEPT, state)):
        signs.append(f"{logs[KEPT]:.2f} of its answers are right, at the start {start:.2f}")
    if logs.get(KL, 0.0) > MOST_KL:
        signs.append(f"its KL from the start is {logs[KL]:.2g} nats/token")
    return signs


def _cause(args: SDFTConfig) -> str:
    if args.teacher_model_kind == "live":
        follows = "a live teacher follows the student wherever it goes: set teacher_model_kind=base, or ema"
    elif args.teacher_model_kind == "ema":
        follows = f"an EMA teacher with teacher_update_rate={args.teacher_update_rate} follows the student: lower it"
    else:
        follows = "the teacher stands still, so the steps are too large"
    return f"Likely cause: {follows}; learning_rate={args.learning_rate:g} may be too high."
