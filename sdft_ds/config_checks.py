"""What SDFTConfig refuses and warns about: values out of range, contradictions, and settings that change nothing.

Every message names the field and the fix. Defaults are read from the fields themselves.
"""

import difflib
import json
import math
import re
import warnings
from typing import Any

from transformers import GenerationConfig

from sdft_ds.divergence import MODES
from sdft_ds.inherited import default, idle_settings
from sdft_ds.prompts import TRUNCATIONS, parse_template
from sdft_ds.screening import BAD_ROWS

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
# Names that fields accept; teacher.add_kind and rollouts.add_backend add to them.
TEACHER_KINDS = ["live", "base", "ema"]
ROLLOUT_BACKENDS = ["generate", "continuous"]
DEVICES = ("device", "cpu")

# Fields that the TRL interface inherits from its reinforcement-learning trainers and self-distillation never reads:
# accepted at their default, refused elsewhere, because a setting that changes nothing misleads.
_POLICY_GRADIENT = "it belongs to a policy gradient with rewards; self-distillation has neither"
_VLLM = "rollouts run in the training process itself, with the current weights"
UNUSED_FIELDS = {
    "beta": _POLICY_GRADIENT,
    "epsilon": _POLICY_GRADIENT,
    "epsilon_high": _POLICY_GRADIENT,
    "importance_sampling_level": _POLICY_GRADIENT,
    "reward_weights": _POLICY_GRADIENT,
    "scale_rewards": _POLICY_GRADIENT,
    "top_entropy_quantile": _POLICY_GRADIENT,
    "diagnostics_warning_interval": "it configures warnings about flat rewards; there are no rewards",
    "diagnostics_flat_tolerance": "it configures warnings about flat rewards; there are no rewards",
    "vllm_mode": _VLLM,
    "vllm_model_impl": _VLLM,
    "vllm_enable_sleep_mode": _VLLM,
    "vllm_server_base_url": _VLLM,
    "vllm_server_host": _VLLM,
    "vllm_server_port": _VLLM,
    "vllm_group_port": _VLLM,
    "vllm_server_timeout": _VLLM,
    "vllm_tensor_parallel_size": _VLLM,
    "vllm_gpu_memory_utilization": _VLLM,
    "vllm_max_model_length": _VLLM,
}

# (TRL 1.5.1, TRL 1.16): the defaults of an EMA teacher, as sync_ref_model and as teacher_model_kind asks for one.
EMA_RATES = (0.6, 0.05)
EMA_STEPS = (512, 1)

# Fields of GenerationConfig that have a field of their own, which the loss or the lengths depend on as well.
OWN_GENERATION_FIELDS = {"max_new_tokens": "max_completion_length"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
}
TEMPLATE_OPTIONS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")


# Metrics of which less is better, beside those that end with "loss".
_LOWER_IS_BETTER = re.compile(r".*(/kl_to_start|/clipped_(share|ratio)|/empty_ratio|divergence/\w+)")


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """A setting that is a dict, or its JSON. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} must be a JSON object, not {value[:40]!r}: {error}.") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(value).__name__}.")
    return value


def lower_is_better(metric: str | None) -> bool:
    return _LOWER_IS_BETTER.fullmatch(metric or "") is not None


def refuse_unused(config: Any) -> None:
    if config.use_vllm:
        raise ValueError(f"use_vllm=True is not supported: {_VLLM}. Leave it False.")
    if config.use_teacher_server:
        raise ValueError(
            "use_teacher_server=True is not supported: the teacher scores in the training process itself and needs no "
            "server. Leave it False."
        )
    if config.scale_rewards is True:  # TRL's older spelling of its default
        config.scale_rewards = "group"
    for name, reason in UNUSED_FIELDS.items():
        expected = default(config, name)
        # TRL itself fills epsilon_high with epsilon, so a configuration copied from there holds 0.2.
        allowed = (expected, config.epsilon) if name == "epsilon_high" else (expected,)
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} has no effect here: {reason}. Leave it at its default, {expected!r}.")


def check_ranges(config: Any) -> None:
    """Each setting by itself."""
    parse_template(config.teacher_prompt_template)
    for name in type(config).__dataclass_fields__:
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value) and name != "max_grad_norm":
            raise ValueError(f"{name} must be a finite number, not {value}.")
    rules = [
        ("distillation_alpha", 0.0 <= config.distillation_alpha <= 1.0, "in [0, 1]"),
        ("distillation_mode", config.distillation_mode in (None, *MODES), f"one of {', '.join(MODES)}"),
        ("distillation_topk", config.distillation_topk is None or config.distillation_topk > 0, "positive or None"),
        (
            "distillation_is_clip",
            config.distillation_is_clip is None or config.distillation_is_clip > 0,
            "positive or None",
        ),
        ("distillation_weight", config.distillation_weight >= 0, "at least 0"),
        ("loss_type", config.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}"),
        ("truncation", config.truncation in TRUNCATIONS, f"one of {', '.join(TRUNCATIONS)}"),
        ("bad_rows", config.bad_rows in BAD_ROWS, f"one of {', '.join(BAD_ROWS)}"),
        ("max_bad_rows", config.max_bad_rows >= 0, "at least 0"),
        ("num_loss_tokens_to_skip", config.num_loss_tokens_to_skip >= 0, "at least 0"),
        ("loss_chunk_tokens", config.loss_chunk_tokens is None or config.loss_chunk_tokens > 0, "positive or unset"),
        ("log_completions", config.log_completions >= 0, "at least 0"),
        ("log_completions_rows", config.log_completions_rows >= 1, "at least 1"),
        ("inspect_tokens", config.inspect_tokens >= 0, "at least 0"),
        ("max_nonfinite_steps", config.max_nonfinite_steps >= 1, "at least 1"),
        ("preemption_exit_code", 0 < config.preemption_exit_code < 256, "in 1 ... 255"),
        ("preemption_deadline_seconds", config.preemption_deadline_seconds > 0, "positive"),
        ("scoring_batch_tokens", config.scoring_batch_tokens >= 1, "at least 1"),
        (
            "teacher_model_kind",
            config.teacher_model_kind in (None, *TEACHER_KINDS),
            f"one of {', '.join(TEACHER_KINDS)}",
        ),
        ("teacher_shadow_device", config.teacher_shadow_device in DEVICES, "device or cpu"),
        ("teacher_states_device", config.teacher_states_device in DEVICES, "device or cpu"),
        ("rollout_backend", config.rollout_backend in ROLLOUT_BACKENDS, f"one of {', '.join(ROLLOUT_BACKENDS)}"),
        (
            "rollout_batch_tokens",
            config.rollout_batch_tokens is None or config.rollout_batch_tokens >= 1,
            "positive or unset",
        ),
        ("num_generations", config.num_generations >= 1, "at least 1"),
        (
            "num_generations_eval",
            config.num_generations_eval is None or config.num_generations_eval >= 1,
            "at least 1 or unset",
        ),
        ("num_iterations", config.num_iterations >= 1, "at least 1"),
        ("max_completion_length", (config.max_completion_length or 0) >= 1, "at least 1"),
        ("max_prompt_length", config.max_prompt_length is None or config.max_prompt_length >= 1, "positive or None"),
        (
            "max_teacher_prompt_length",
            config.max_teacher_prompt_length is None or config.max_teacher_prompt_length >= 1,
            "positive or unset",
        ),
        (
            "temperature",
            config.temperature > 0,
            'positive (for greedy rollouts: generation_kwargs {"do_sample": false})',
        ),
        *(
            (name, 0.0 <= (getattr(config, name) or 0.0) <= 1.0, "in [0, 1]")
            for name in ("ref_model_mixup_alpha", "teacher_update_rate")
        ),
        *(
            (name, getattr(config, name) is None or getattr(config, name) >= 1, "at least 1")
            for name in ("ref_model_sync_steps", "teacher_sync_steps")
        ),
    ]
    for name, holds, needed in rules:
        if not holds:
            raise ValueError(f"{name} must be {needed}, not {getattr(config, name)!r}.")


def refuse_contradictions(config: Any) -> None:
    """Settings that cannot be together, or not on this machine."""
    if config.rollout_backend == "continuous":
        if not config.ds3_gather_for_generation:
            raise ValueError(
                "rollout_backend='continuous' needs the whole weights on each rank: leave "
                "ds3_gather_for_generation=True, or use rollout_backend='generate'."
            )
        if config.cache_implementation is not None:
            raise ValueError(
                "rollout_backend='continuous' has a paged cache of its own and contradicts "
                f"cache_implementation={config.cache_implementation!r}: leave it unset."
            )
    if config.fp16 and config.use_cpu:
        raise ValueError(
            "fp16=True needs a GPU, and this run is on the CPU: set bf16=True, or bf16=False for float32."
        )
    if config.num_loss_tokens_to_skip >= config.max_completion_length:
        raise ValueError(
            f"num_loss_tokens_to_skip={config.num_loss_tokens_to_skip} leaves nothing of completions of "
            f"max_completion_length={config.max_completion_length} tokens: lower it."
        )
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True contradicts generation batches of a fixed size: leave it False, and lower "
            "per_device_train_batch_size."
        )
    if config.eval_strategy == "no" and (config.load_best_model_at_end or config.save_strategy == "best"):
        raise ValueError(
            f"{'load_best_model_at_end=True' if config.load_best_model_at_end else 'save_strategy=best'} needs "
            "evaluations to choose by: set eval_strategy to steps or epoch, and give an eval_dataset."
        )
    _check_dicts(config)


def _check_dicts(config: Any) -> None:
    for secret in {"token", "use_auth_token"} & set(config.model_init_kwargs or ()):
        raise ValueError(
            f"model_init_kwargs: {secret!r} would be saved with the run: set the environment variable HF_TOKEN, or "
            "log in with `hf auth login`."
        )
    for name in config.chat_template_kwargs or ():
        if name in TEMPLATE_OPTIONS:
            raise ValueError(f"chat_template_kwargs: {name!r} is set by this program: leave it out.")
    known = vars(GenerationConfig())
    for name in config.generation_kwargs or ():
        if name in OWN_GENERATION_FIELDS:
            raise ValueError(f"generation_kwargs: {name!r} has a setting of its own: {OWN_GENERATION_FIELDS[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"generation_kwargs: transformers' GenerationConfig has no {name!r}"
                + (f"; did you mean {close[0]!r}?" if close else ".")
            )


def warn_of_starved_gradient(config: Any) -> None:
    """The generalised JSD tends to 0 at its ends, which are KLs by definition: the gradient is small just beside
    them."""
    alpha = config.distillation_alpha
    if 0.0 < alpha < 0.1 or 0.9 < alpha < 1.0:
        warnings.warn(
            f"distillation_alpha={alpha}: so near to an end the gradient of the generalised JSD is that of a KL times "
            f"about alpha (1 - alpha) = {alpha * (1 - alpha):.2g} (0.25 at alpha 0.5). Set distillation_alpha="
            f"{round(alpha)}, which is the {('forward', 'reverse')[round(alpha)]} KL itself, or a value from 0.1 to "
            "0.9.",
            stacklevel=4,
        )


def warn_of_ineffective(config: Any) -> None:
    """Settings that are not at their default and change nothing, given the others."""
    follows = config.teacher_model_kind not in (None, "live", "base")
    zero3 = config.hf_deepspeed_config is not None and config.hf_deepspeed_config.is_zero3()
    no_ema = f"the teacher is {config.teacher_model_kind or 'live or base'}, not ema"
    ineffective = {
        "teacher_update_rate": (not follows and config.teacher_update_rate not in EMA_RATES, no_ema),
        "teacher_sync_steps": (not follows and config.teacher_sync_steps not in EMA_STEPS, no_ema),
        "teacher_shadow_device": (
            config.teacher_model_kind == "live" and config.teacher_shadow_device == "cpu",
            "a live teacher has no values of its own",
        ),
        "ds3_gather_for_generation": (not config.ds3_gather_for_generation and not zero3, "the run is not ZeRO-3"),
    }
    own = [(f"{name}={getattr(config, name)!r}", reason) for name, (idle, reason) in ineffective.items() if idle]
    for setting, reason in [*own, *idle_settings(config)]:
        warnings.warn(f"{setting} has no effect: {reason}.", stacklevel=4)


def warn_of_still_teacher(config: Any, max_steps: int) -> None:
    """An EMA teacher that the run is too short for stays what it was at the start."""
    if config.teacher_model_kind == "ema" and max_steps < config.teacher_sync_steps:
        warnings.warn(
            f"The EMA teacher will never move: it follows every teacher_sync_steps={config.teacher_sync_steps} steps, "
            f"and the run has {max_steps}. Set teacher_sync_steps=1 and a small teacher_update_rate (0.05), or "
            "teacher_model_kind='base'.",
            stacklevel=2,
        )
