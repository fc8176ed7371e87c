"""Settings of TRL's interface that are refused: those inherited there from its reinforcement-learning trainers, which
self-distillation never reads, and its teacher server."""

from dataclasses import dataclass

from sdft_ds.config.fields import (
    unused,
)

_POLICY_GRADIENT = "it belongs to a policy gradient with rewards; self-distillation has neither"
_FLAT_REWARDS = "it configures warnings about flat rewards; there are no rewards"
_OWN_PROCESS = "the teacher scores in the training process itself and needs no server"


@dataclass
class TrlCompatSettings:
    beta: float = unused(0.0, _POLICY_GRADIENT)
    epsilon: float = unused(0.2, _POLICY_GRADIENT)
    epsilon_high: float | None = unused(None, _POLICY_GRADIENT)
    importance_sampling_level: str = unused("token", _POLICY_GRADIENT)
    reward_weights: list[float] | None = unused(None, _POLICY_GRADIENT)
    scale_rewards: str = unused("group", _POLICY_GRADIENT)
    top_entropy_quantile: float = unused(1.0, _POLICY_GRADIENT)
    diagnostics_warning_interval: int = unused(10, _FLAT_REWARDS)
    diagnostics_flat_tolerance: float = unused(1e-8, _FLAT_REWARDS)
    use_teacher_server: bool = unused(False, _OWN_PROCESS)
