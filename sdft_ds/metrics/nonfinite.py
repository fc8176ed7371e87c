"""Skips optimizer steps with non-finite gradients, counts them, and aborts after N consecutive ones. Also warns of a
runaway divergence, of a run that learns nothing, and of a top-k that misses much of the teacher's probability mass;
metrics/collapse.py watches what is sampled."""

import math
import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import engines
from sdft_ds.metrics.meters import Meters

DIVERGENCE = "sdft/distillation_loss"
# It runs away if it exceeds LEAST nats, and RUNAWAY times the mean of at least LINES_BEFORE earlier log lines.
LEAST, RUNAWAY, LINES_BEFORE = 0.5, 5.0, 5
MISSED = 0.02  # warn at this share of the teacher's mass outside the student's top-k, and again each time it doubles


class TooManyNonFiniteSteps(FloatingPointError):
    """The gradient was non-finite in max_nonfinite_steps consecutive steps."""


class NonFiniteGuard(TrainerCallback):
    """All ranks decide alike, because the gradient norm is global."""

    def __init__(self, meters: Meters, limit: int):
        self.meters = meters
        self.limit = limit
        self._start()

    def _start(self) -> None:
        self.skipped = False  # whether the last step was skipped
        self.in_a_row = 0
        self.learns = False  # whether any gradient so far was not exactly 0
        self.logged = False
        self.divergences: list[float] = []  # of each log line
        self.missed = MISSED / 2  # the largest share warned about so far

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._start()

    def before_step(self, engine: nn.Module, grad_norm: float | None) -> None:
        """Called with the norm before the optimizer step. DeepSpeed has by then made or skipped its own step."""
        finite = grad_norm is None or math.isfinite(grad_norm)
        self.learns |= grad_norm != 0.0
        self.skipped = engines.step_was_skipped(engine) or not finite
        if not finite:
            engines.drop_gradients(engine)

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        if self.skipped:
            self.meters.add("steps/nonfinite", 1.0 / args.world_size)
        if self.in_a_row >= self.limit:
            good = state.best_model_checkpoint or args.output_dir
            raise TooManyNonFiniteSteps(
                f"The gradient was not finite in {self.in_a_row} optimizer steps in a row, up to step "
                f"{state.global_step}; none of them changed the weights. Lower the learning rate or look at the data, "
                f"and resume from the last checkpoint in {good} (resume_from_checkpoint=True; on the command line "
                "--resume_from_checkpoint true). "
                "max_nonfinite_steps sets how many are borne."
            )

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if "loss" in (logs or {}) and not self.logged:
            self.logged = True
            self._warn_of_nothing_learned(logs, state.global_step)
        if DIVERGENCE in (logs or {}):
            self._warn_of_runaway(logs[DIVERGENCE], state.global_step)
        mass = (logs or {}).get("topk/teacher_mass")
        if mass is not None and args.distillation_mode == "topk_logits" and not args.distillation_add_tail:
            self._check_support(1.0 - mass, args, state.global_step)

    def _warn_of_runaway(self, divergence: float, step: int) -> None:
        before = self.divergences
        if len(before) >= LINES_BEFORE and divergence > max(LEAST, RUNAWAY * sum(before) / len(before)):
            warnings.warn(
                f"{DIVERGENCE} is {divergence:.3g} at step {step}, and was {sum(before) / len(before):.3g} on "
                "average before: it may be running away. A lower learning_rate or an ema teacher helps.",
                stacklevel=3,
            )
        before.append(divergence)

    def _warn_of_nothing_learned(self, logs: dict[str, float], step: int) -> None:
        """Called at the first log line."""
        if logs.get("completions/loss_tokens") == 0:
            why = (
                "no completion had a solution of its prompt or feedback to learn from. preview shows the rows, "
                "metrics.jsonl the rewards."
                if "rewards/mean" in logs
                else "completions were empty, skipped entirely (num_loss_tokens_to_skip), or cut off and masked "
                "(mask_truncated_completions)."
            )
            warnings.warn(
                f"Up to step {step} no token contributed to the loss, and nothing was learned: {why}", stacklevel=2
            )
        elif not self.learns:
            warnings.warn(
                f"Up to step {step} the gradient was exactly 0, and nothing was learned: student and teacher gave "
                "the same distribution. Does the teacher see more? python -m sdft_ds.preview shows both prompts.",
                stacklevel=2,
            )

    def _check_support(self, missed: float, args: SDFTConfig, step: int) -> None:
        if missed > 2 * self.missed:
            self.missed = missed
            support, topk = args.distillation_support, args.distillation_topk
            whose = {"student": "the student's", "teacher": "the teacher's", "union": "both sides'"}[support]
            union = "distillation_support='union' (the teacher's tokens as well), " if support == "student" else ""
            warnings.warn(
                f"topk/teacher_mass is {1 - missed:.3g} at step {step}: {whose} top {topk} tokens miss {missed:.0%} "
                "of the teacher's probability, and the loss does not see it. Set "
                f"{union}distillation_add_tail=True (the others become one more bucket), raise distillation_topk, or "
                "set distillation_mode='full_logits'.",
                stacklevel=3,
            )
