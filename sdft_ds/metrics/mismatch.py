"""Tells when the sampler's log-probabilities leave the student's: an engine that generates with other weights."""

import warnings

from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig

DIFFERENCE = "rollout/logprob_diff"
# Nats. Other kernels in bf16 differ by 0.01 to 0.06 on average; weights of another step by 0.2 and more.
HIGH_AT_THE_START = 0.3
MARGIN, FACTOR = 0.05, 3.0  # above the first log line's


class MismatchGuard(TrainerCallback):
    """Warns once."""

    def __init__(self) -> None:
        self.floor: float | None = None
        self.told = False

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self.floor, self.told = None, False

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs: object
    ) -> None:
        if self.told or DIFFERENCE not in logs:
            return
        found = logs[DIFFERENCE]
        high = HIGH_AT_THE_START if self.floor is None else FACTOR * self.floor + MARGIN
        self.floor = found if self.floor is None else self.floor
        if not found <= high:
            self.told = True
            warnings.warn(
                f"At step {state.global_step} the sampler's log-probability of a token differs from the student's by "
                f"{found:.2g} nats on average ({self.floor:.2g} at the start of the run): the rollouts may be from "
                "other weights, or computed in another precision. Compare with use_vllm=False.",
                stacklevel=2,
            )
