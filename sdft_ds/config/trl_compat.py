"""Unused settings of TRL's interface, inherited there from its reinforcement-learning trainers."""

from dataclasses import dataclass

from sdft_ds.config.fields import (
    unused,
)

_POLICY_GRADIENT = "it belongs to a policy gradient with rewards; self-distillation has neither"
_FLAT_REWARDS = "it configures warnings about flat rewards; there are no rewards"
VLLM = "rollouts run in the training process itself, with the current weights"


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
    vllm_mode: str = unused("colocate", VLLM)
    vllm_model_impl: str = unused("vllm", VLLM)
    vllm_enable_sleep_mode: bool = unused(False, VLLM)
    vllm_server_base_url: str | None = unused(None, VLLM)
    vllm_server_host: str = unused("0.0.0.0", VLLM)
    vllm_server_port: int = unused(8000, VLLM)
    vllm_group_port: int = unused(51216, VLLM)
    vllm_server_timeout: float = unused(240.0, VLLM)
    vllm_tensor_parallel_size: int = unused(1, VLLM)
    vllm_gpu_memory_utilization: float = unused(0.3, VLLM)
    vllm_max_model_length: int | None = unused(None, VLLM)
