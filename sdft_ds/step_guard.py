"""Bad numbers: a step whose gradient is not finite changes nothing, is counted, and too many in a row end the run; a
divergence or a length that runs away is warned about."""

import math
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds import zero
from sdft_ds.config import SDFTConfig
from sdft_ds.metrics import Meters

# A metric runs away where it exceeds this many times the mean of what was logged before, of at least so many lines.
RUNAWAY, LINES_BEFORE = 5.0, 5
WATCHED = {"sdft/distillation_loss": 0.5, "completions/mean_length": 16.0}  # and this much at least


class TooManyBadSteps(FloatingPointError):
    """The gradient was not finite for max_nonfinite_steps steps in a row."""


class StepGuard(TrainerCallback):
    """Every rank comes to the same answer: a gradient's norm is that of all ranks together."""

    def __init__(self, meters: Meters, limit: int):
        self.meters = meters
        self.limit = limit
        self.skipped = False  # the last step
        self.in_a_row = 0
        self.history: dict[str, list[float]] = {name: [] for name in WATCHED}

    def before_step(self, engine: nn.Module, grad_norm: float | None) -> None:
        """Called with the norm before the optimizer's step. DeepSpeed has taken its own by then, or left it out."""
        finite = grad_norm is None or math.isfinite(grad_norm)
        self.skipped = zero.step_was_skipped(engine) or not finite
        if not finite:
            zero.drop_gradients(engine)

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        if self.skipped:
            self.meters.add("steps/nonfinite", 1.0 / args.world_size)
        if self.in_a_row >= self.limit:
            good = state.best_model_checkpoint or args.output_dir
            raise TooManyBadSteps(
                f"The gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step "
                f"{state.global_step}; none of them changed the weights. Lower the learning rate or look at the data, "
                f"and resume from the last checkpoint in {good} (--resume_from_checkpoint true). "
                "max_nonfinite_steps sets how many are borne."
            )

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        for name, least in WATCHED.items():
            value, before = (logs or {}).get(name), self.history[name]
            if value is None:
                continue
            if len(before) >= LINES_BEFORE and value > max(least, RUNAWAY * sum(before) / len(before)):
                warnings.warn(
                    f"{name} is {value:.3g} at step {state.global_step}, and was {sum(before) / len(before):.3g} on "
                    "average before: it may be running away. A lower learning_rate or an ema teacher helps.",
                    stacklevel=2,
                )
            before.append(value)
