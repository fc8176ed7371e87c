"""Validates SDFTConfig: values out of range, contradictions, and settings without effect are refused or warned about.

Every message names the field and the fix. Defaults are read from the fields themselves.
"""

import difflib
import json
import math
import re
import warnings
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

from sdft_ds.config.fields import check_ranges, default, without_effect
from sdft_ds.config.inherited import idle_settings
from sdft_ds.config.teacher import EMA_RATES, EMA_STEPS
from sdft_ds.config.vllm import refuse_vllm_contradictions
from sdft_ds.data.prompts import parse_template

# Fields of GenerationConfig with a setting of their own, because the loss or the lengths depend on them as well.
OWN_GENERATION_FIELDS = {"max_new_tokens": "max_completion_length"} | {
    name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
}
TEMPLATE_OPTIONS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")


# Metrics for which lower is better, in addition to those that end with "loss".
_LOWER_IS_BETTER = re.compile(r".*(/kl_to_start|/clipped_(share|ratio)|/empty_ratio|divergence/\w+)")


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """Parse a setting that is a dict or its JSON. Raises ValueError."""
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
    if config.scale_rewards is True:  # TRL's older spelling of its default
        config.scale_rewards = "group"
    for f in fields(config):
        reason = f.metadata.get("unused")
        # TRL itself fills epsilon_high with epsilon, so a configuration copied from there holds 0.2.
        allowed = (f.default, config.epsilon) if f.name == "epsilon_high" else (f.default,)
        if reason is not None and getattr(config, f.name) not in allowed:
            value = getattr(config, f.name)
            raise ValueError(
                f"{f.name}={value!r} would have no effect here: {reason}. Leave it at its default, {f.default!r}."
            )


def check_values(config: Any) -> None:
    """Validate each setting by itself."""
    parse_template(config.teacher_prompt_template)
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, float) and not math.isfinite(value) and f.name != "max_grad_norm":
            raise ValueError(f"{f.name} must be a finite number, not {value}.")
    check_ranges(config)


def refuse_contradictions(config: Any) -> None:
    """Raises ValueError for settings that cannot be combined, or not on this machine."""
    if config.rollout_backend == "continuous":
        if not config.ds3_gather_for_generation:
            raise ValueError(
                "rollout_backend='continuous' needs the full weights on each rank: leave "
                "ds3_gather_for_generation=True, or use rollout_backend='generate'."
            )
        if config.cache_implementation is not None:
            raise ValueError(
                "rollout_backend='continuous' has a paged cache of its own and contradicts "
                f"cache_implementation={config.cache_implementation!r}: leave it unset."
            )
    refuse_vllm_contradictions(config)
    if config.fp16 and config.use_cpu:
        raise ValueError(
            "fp16=True needs a GPU, and this run is on the CPU: leave it out; bf16=False alone is float32."
        )
    if config.num_loss_tokens_to_skip >= config.max_completion_length:
        raise ValueError(
            f"num_loss_tokens_to_skip={config.num_loss_tokens_to_skip} leaves nothing of completions of "
            f"max_completion_length={config.max_completion_length} tokens: lower it."
        )
    if config.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True is not supported, because generation batches have a fixed size: leave it "
            "False, and lower per_device_train_batch_size."
        )
    if config.eval_strategy == "no" and (config.load_best_model_at_end or config.save_strategy == "best"):
        raise ValueError(
            f"{'load_best_model_at_end=True' if config.load_best_model_at_end else 'save_strategy=best'} needs "
            "evaluations to choose by: set eval_strategy to steps or epoch, and give an eval_dataset."
        )
    _check_dicts(config)


def refuse_rollouts_from_teacher(config: Any) -> None:
    """Raises ValueError for rollouts from a prompt with a context that is made after the rollout."""
    for name in ("generate_from_teacher", "teacher_rollout_fraction"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)} rolls out from the teacher's prompt, whose context is made only "
                f"after the rollout: leave {name} at {default(config, name)}."
            )


def _check_dicts(config: Any) -> None:
    for secret in {"token", "use_auth_token"} & set(config.model_init_kwargs or ()):
        raise ValueError(
            f"model_init_kwargs: {secret!r} would be saved with the run: set the environment variable HF_TOKEN, or "
            "log in with `hf auth login`."
        )
    for setting in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
        for name in getattr(config, setting) or ():
            if name in TEMPLATE_OPTIONS:
                raise ValueError(f"{setting}: {name!r} is set by sdft_ds itself: leave it out.")
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
    """Warns of an alpha close to 0 or 1: the generalized JSD tends to 0 there, so its gradient is small; at exactly 0
    and 1 it is a KL by definition."""
    alpha = config.distillation_alpha
    if 0.0 < alpha < 0.1 or 0.9 < alpha < 1.0:
        warnings.warn(
            f"distillation_alpha={alpha}: so close to 0 or 1 the gradient of the generalised JSD is that of a KL "
            f"times about alpha (1 - alpha) = {alpha * (1 - alpha):.2g} (0.25 at alpha 0.5). Set distillation_alpha="
            f"{round(alpha)}, which is the {('forward', 'reverse')[round(alpha)]} KL itself, or a value from 0.1 to "
            "0.9.",
            stacklevel=4,
        )


def warn_of_ineffective(config: Any) -> None:
    """Warns of non-default settings that have no effect, given the others."""
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
        "teacher_rollout_fraction": (
            config.generate_from_teacher and config.teacher_rollout_fraction > 0,
            "generate_from_teacher=True rolls out every row from the teacher's prompt",
        ),
        "ds3_gather_for_generation": (not config.ds3_gather_for_generation and not zero3, "the run is not ZeRO-3"),
    }
    own = [(f"{name}={getattr(config, name)!r}", reason) for name, (idle, reason) in ineffective.items() if idle]
    for setting, reason in [*own, *idle_settings(config)]:
        warnings.warn(f"{setting} has no effect: {reason}.", stacklevel=4)
    for sentence in without_effect(type(config), vars(config), vars(config)):
        warnings.warn(sentence, stacklevel=4)


def warn_of_still_teacher(config: Any, max_steps: int) -> None:
    """Warns of a run too short for its EMA teacher to be updated even once."""
    if config.teacher_model_kind == "ema" and max_steps < config.teacher_sync_steps:
        warnings.warn(
            f"The EMA teacher will never be updated: that is due every teacher_sync_steps="
            f"{config.teacher_sync_steps} steps, and the run has {max_steps}. Set teacher_sync_steps=1 and a small "
            "teacher_update_rate (0.05), or teacher_model_kind='base'.",
            stacklevel=2,
        )
