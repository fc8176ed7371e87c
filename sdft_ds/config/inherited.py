"""Inherited settings of transformers, accelerate and DeepSpeed: which are refused or ignored, what to use instead, and
how a resume handles them.

All other settings that SDFTConfig inherits work as documented by transformers.
"""

import os
from collections.abc import Iterator
from typing import Any

from accelerate.state import AcceleratorState
from transformers import Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from sdft_ds.config.fields import (
    ANOTHER_RUN,
    APPLIED,
    COMPARED_AS_ROWS,
    FREE,
    NO_EFFECT,
    OF_ONE_PRECISION,
    OF_THE_TRAINER,
    REFUSED,
    UNCOMPARED,
    OnResume,
    default,
)  # fmt: skip

# Read by methods of transformers' Trainer that are overridden here: warned about, not refused, because existing
# scripts set them.
_OWN_LOADER = "rows are read when their generation batch is made, not by a data loader"
_NO_LABELS = "the loss has no labels"
_LOSS_ONLY = "an evaluation computes the loss and the metrics of the run, and keeps no predictions"
IGNORED_FIELDS = {
    "remove_unused_columns": _OWN_LOADER,
    "dataloader_num_workers": _OWN_LOADER,
    "dataloader_prefetch_factor": _OWN_LOADER,
    "dataloader_persistent_workers": _OWN_LOADER,
    "dataloader_multiprocessing_context": _OWN_LOADER,
    "dataloader_in_order": _OWN_LOADER,
    "train_sampling_strategy": "the order of rows follows shuffle_dataset and the seed",
    "length_column_name": "rows are ordered by shuffle_dataset and the seed, not by their length",
    "label_smoothing_factor": _NO_LABELS,
    "label_names": _NO_LABELS,
    "average_tokens_across_devices": "the loss is normalised over all ranks in any case",
    "use_cache": "rollouts use a cache in any case, and training never does",
    "prediction_loss_only": _LOSS_ONLY,
    "eval_do_concat_batches": _LOSS_ONLY,
    "eval_accumulation_steps": _LOSS_ONLY,
    "include_for_metrics": _LOSS_ONLY,
    "batch_eval_metrics": _LOSS_ONLY,
}
# The same for accelerator_config.
IGNORED_BY_ACCELERATE = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")

_WHOLE_LAYERS = (
    "each rank computes complete rows with complete layers. Leave it unset: ZeRO (deepspeed) shards the weights"
)
_COMPILED = (
    "the loss is computed inside the model's forward, which torch.compile cannot see. Leave it unset: "
    "cache_implementation='static' compiles the decode step of rollouts on a GPU"
)
_FULL_EVAL = (
    "it would leave the weights in half precision. Leave it False: evaluations compute in the precision of training"
)
_GRADIENT_PROJECTION = "GaLore and APOLLO are not supported. Leave it unset: use_peft trains fewer weights"
# Refused unless at their default.
REFUSED_FIELDS = {
    "fsdp": _WHOLE_LAYERS,
    "parallelism_config": _WHOLE_LAYERS,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "neftune_noise_alpha": "the student would see noise that its teacher does not. Leave it unset",
    "ddp_static_graph": "torch allows it only where every backward is synchronised, and accumulation is not. "
    "Leave it unset",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "optim_target_modules": _GRADIENT_PROJECTION,
    "eval_use_gather_object": "an evaluation's losses are tensors. Leave it False",
    "ignore_data_skip": "a resume continues with the next row, which takes no time. Leave it False",
    "save_on_each_node": "all ranks write one checkpoint, in a folder that the nodes share. Leave it False",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save in any case, on all ranks together. Leave it False",
}
# Environment variable set by accelerate's launcher -> (refused value, reason).
REFUSED_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("true", _WHOLE_LAYERS),
    "ACCELERATE_USE_MEGATRON_LM": ("true", _WHOLE_LAYERS),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", _WHOLE_LAYERS),
    "ACCELERATE_MIXED_PRECISION": ("fp8", "the loss is not made for it. Use bf16"),
}
# Their step does not update the weights that forwards use: it runs within backward, where a non-finite step could not
# be skipped, or separate weights are kept for rollouts and checkpoints.
REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
# Optimizers with a CPU-offload counterpart in accelerate. It silently replaces any other by Adam.
OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")

# Variables in which launchers pass the number of processes they start.
COUNTS_OF_PROCESSES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# ---- how a resume handles a changed value, and which are secret, derived or on the model card -----------------------

_SCHEDULE = OnResume(APPLIED, "the schedule is rebuilt and continues at the checkpoint's step")
_GROUPS = OnResume(APPLIED, "set in the groups of the optimizer")
_BEST = OnResume(APPLIED, "the best checkpoint is chosen again")
_OPTIMIZER = OnResume(REFUSED, "the optimizer's state is that of another one")
ON_RESUME: dict[str, OnResume] = {
    **dict.fromkeys(
        ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
        _SCHEDULE,
    ),
    **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), _GROUPS),
    **dict.fromkeys(("eval_steps", "save_steps"), OF_THE_TRAINER),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("optim", "optim_args", "optim_target_modules"), _OPTIMIZER),
    **dict.fromkeys(("seed", "data_seed", "dataloader_drop_last"), ANOTHER_RUN),
    "fp16": OF_ONE_PRECISION,
    **dict.fromkeys(("gradient_accumulation_steps", "per_device_train_batch_size"), COMPARED_AS_ROWS),
    "logging_first_step": OnResume(NO_EFFECT, "the first step is over"),
    **dict.fromkeys(
        ("output_dir", "resume_from_checkpoint", "run_name", "local_rank", "deepspeed"),
        UNCOMPARED,
    ),
    **dict.fromkeys(
        (
            "average_tokens_across_devices", "max_grad_norm", "label_smoothing_factor", "bf16_full_eval",
            "fp16_full_eval", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs",
            "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
            "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "neftune_noise_alpha",
            "torch_empty_cache_steps", "auto_find_batch_size", "logging_strategy", "log_on_each_node",
            "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm", "project",
            "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_delay",
            "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches",
            "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics",
            "save_only_model", "save_strategy", "save_on_each_node", "save_total_limit",
            "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
            "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end", "ignore_data_skip",
            "restore_callback_states_from_checkpoint", "full_determinism", "use_cpu", "accelerator_config",
            "parallelism_config", "dataloader_num_workers", "dataloader_pin_memory",
            "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
            "dataloader_in_order", "label_names", "train_sampling_strategy", "length_column_name",
            "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph",
            "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "debug", "skip_memory_metrics", "do_train",
            "do_eval", "do_predict",
        ),
        FREE,
    ),
}  # fmt: skip
SECRETS = {"hub_token"}
# Specific to one process, or older names of other settings.
DERIVED = {"local_rank", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
ON_THE_CARD = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "fp16")

# Arguments of transformers' and TRL's trainers that SDFTTrainer does not accept.
_OWN_LOSS = "the loss is the divergence from the teacher. Leave it out"
_OWN_TEACHER = "the teacher is the student's own network, with the weights that teacher_model_kind names. Leave it out"
_NO_REWARDS = "self-distillation has no rewards. Leave it out"
REFUSED_ARGUMENTS = {
    "tokenizer": "its name is processing_class",
    "ref_model": _OWN_TEACHER,
    "teacher_model": _OWN_TEACHER,
    "reward_funcs": _NO_REWARDS,
    "reward_processing_classes": _NO_REWARDS,
    "data_collator": "micro-batches are made of rollouts. Leave it out",
    "formatting_func": "prompts are made of the columns prompt and privileged_context, by teacher_prompt_template",
    "quantization_config": "give it in SDFTConfig(model_init_kwargs={'quantization_config': ...})",
    "model_init": "give the model itself, or its name",
    "compute_loss_func": _OWN_LOSS,
    "compute_metrics": f"{_LOSS_ONLY}. Leave it out",
    "preprocess_logits_for_metrics": f"{_LOSS_ONLY}. Leave it out",
    "optimizer_cls_and_kwargs": "give optimizers, or SDFTConfig(optim=..., optim_args=...)",
}


def refuse_lone_processes() -> None:
    """Raises ValueError if several processes were started without rank information: each would be rank 0 of 1, and
    all would train the same on the first GPU."""
    if "RANK" in os.environ:
        return
    for name in COUNTS_OF_PROCESSES:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise ValueError(
                f"{count} processes were started ({name}), and each takes itself for the only one, because "
                "RANK is not set: start them with torchrun or deepspeed; or set RANK, LOCAL_RANK, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT for each, as launch/slurm/train.sbatch does."
            )


def refuse_arguments(arguments: dict[str, Any]) -> None:
    """Raises TypeError for arguments that SDFTTrainer does not accept, with the fix for those of other trainers."""
    for name in arguments:
        reason = REFUSED_ARGUMENTS.get(name, "there is no such argument")
        raise TypeError(f"The trainer does not take {name}: {reason}.")


def refuse_settings(config: Any) -> None:
    """Raises ValueError for unsupported settings of transformers and accelerate."""
    for name, reason in REFUSED_FIELDS.items():
        if getattr(config, name) not in (default(config, name), False):
            value = " ".join(str(getattr(config, name)).split())
            raise ValueError(f"{name}={value} is not supported: {reason}.")
    for name, (refused, reason) in REFUSED_OF_ACCELERATE.items():
        if os.environ.get(name, "").lower() == refused:
            raise ValueError(f"accelerate's configuration, {name}={refused}, is not supported: {reason}.")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(f"accelerate's configuration, ACCELERATE_DYNAMO_BACKEND, is not supported: {_COMPILED}.")
    if AcceleratorState._shared_state:  # otherwise it is cleared for each configuration
        raise ValueError(
            "accelerator_config: use_configured_state is not supported: it keeps the state of an Accelerator that was "
            "made before. Leave it out."
        )
    if "num_steps" in (config.accelerator_config.gradient_accumulation_kwargs or {}):
        raise ValueError("accelerator_config: num_steps is not supported: set gradient_accumulation_steps.")
    if config.full_determinism and not config.use_cpu:
        raise ValueError(
            "full_determinism=True is not supported on a GPU: sampling sums probabilities, which CUDA does not do "
            "deterministically. Leave it False: the random draws depend on the seed only in any case."
        )
    if config.use_liger_kernel:
        config.liger_kernel_config = _without_ligers_heads(config)
    _refuse_optimizer(config)
    available = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: there is no {tracker!r}; there are {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if tracker not in (*available, "azure_ml", "flyte"):  # transformers does not detect these two
            raise ValueError(f"report_to: {tracker} is not installed: pip install {tracker}, or leave it out.")


_LIGER_HEADS = ("fused_linear_cross_entropy", "cross_entropy")


def _without_ligers_heads(config: Any) -> dict[str, Any]:
    """liger_kernel_config, in which Liger's losses are off: it would replace the model's forward, or torch's cross
    entropy, by them. Raises ValueError if one is asked for, or if there are no kernels here."""
    kernels = config.liger_kernel_config or {}
    for name in _LIGER_HEADS:
        if kernels.get(name):
            raise ValueError(
                f"liger_kernel_config: {name} would replace the model's forward, in which the loss is computed, or "
                "what it computes with: leave it out."
            )
    if config.use_cpu:
        raise ValueError("use_liger_kernel=True needs a GPU, and this run is on the CPU: leave it False.")
    if not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True needs liger-kernel, which is not installed: pip install liger-kernel, or leave it "
            "False."
        )
    return {**kernels, **dict.fromkeys(_LIGER_HEADS, False)}


def _refuse_optimizer(config: Any) -> None:
    name = config.optim.value
    if name.startswith(REFUSED_OPTIMIZERS):
        raise ValueError(
            f"optim={name} is not supported: its steps do not update the weights that forwards compute with. Use "
            "adamw_torch; an adapter (use_peft) trains fewer weights."
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optim={name} cannot be used: {' '.join(str(error).split())}") from None


def refuse_in_deepspeed(config: Any) -> None:
    """Raises ValueError for unsupported options of the DeepSpeed configuration in effect."""
    deepspeed = config.hf_deepspeed_config
    if deepspeed is None:
        return
    if deepspeed.mismatches:
        found = "; ".join(each.removeprefix("- ").strip() for each in deepspeed.mismatches)
        raise ValueError(
            f'deepspeed: the configuration (ds) contradicts the flags (hf): {found}. Write "auto" there, or make them '
            "equal."
        )
    for key, reason in _refused_in_deepspeed(config, deepspeed.get_value):
        raise ValueError(f"deepspeed: {key} is not supported: {reason}.")


def _refused_in_deepspeed(config: Any, get: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, reason and fix) for each refused key."""
    for key in ("tensor_parallel.autotp_size", "sequence_parallel_size"):
        if (get(key) or 1) > 1:
            yield key, _WHOLE_LAYERS
    if get("compile.deepcompile"):
        yield "compile.deepcompile", _COMPILED
    if get("torch_autocast.enabled"):
        yield "torch_autocast", "rollouts would compute in another precision. Leave it out, and set bf16"
    if get("zero_optimization.zenflow"):
        yield "zero_optimization.zenflow", "a teacher's weights could not be swapped in. Leave it out"
    if get("bf16.enabled") and get("zero_optimization.stage") < 2:
        if get("data_types.grad_accum_dtype") not in (None, "bf16", "bfloat16"):
            yield (
                "data_types.grad_accum_dtype",
                "below stage 2 its optimizer keeps weights that cannot be swapped. Leave it out, or use stage 2",
            )
    for what in ("offload_param", "offload_optimizer"):
        if get(f"zero_optimization.{what}.device") == "nvme":
            yield (
                f'zero_optimization.{what}.device="nvme"',
                'such runs hang at the start, or resume from the initial weights. Write "cpu"',
            )
    for half in ("bf16", "fp16"):
        if get(f"{half}.{half}_master_weights_and_grads"):
            yield (
                f"{half}.{half}_master_weights_and_grads",
                "without fp32 masters small updates are lost, the teacher's too. Leave it out",
            )
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if get(f"zero_optimization.{key}") and config.ds3_gather_for_generation:
            yield (
                f"zero_optimization.{key}",
                "training would compute with quantized weights, and rollouts with those before. Leave it out, or set "
                "ds3_gather_for_generation=False",
            )
    if (
        (get("zero_optimization.offload_optimizer.device") or "none") != "none"
        and get("zero_force_ds_cpu_optimizer", True)
        and get("optimizer") is None
        and config.optim not in OFFLOADED_OPTIMIZERS
    ):
        yield (
            "zero_optimization.offload_optimizer",
            f"Adam would run instead of optim={config.optim.value}. Set optim to one of "
            f"{', '.join(OFFLOADED_OPTIMIZERS)}, or do not offload the optimizer",
        )


def idle_settings(config: Any) -> Iterator[tuple[str, str]]:
    """Yields (setting, why it has no effect) for inherited settings."""
    for name, reason in IGNORED_FIELDS.items():
        if getattr(config, name) != default(config, name):
            yield f"{name}={getattr(config, name)!r}", reason
    plain = type(config.accelerator_config)()
    for name in IGNORED_BY_ACCELERATE:
        if getattr(config.accelerator_config, name) != getattr(plain, name):
            yield f"accelerator_config: {name}={getattr(config.accelerator_config, name)!r}", _OWN_LOADER
    for name, needed in (("liger_kernel_config", "use_liger_kernel"), ("fsdp_config", "fsdp")):
        if getattr(config, name) and not getattr(config, needed):
            yield f"{name}={getattr(config, name)!r}", f"{needed} is not set"
    if config.eval_steps is not None and config.eval_strategy == "no":
        yield f"eval_steps={config.eval_steps!r}", "eval_strategy is no; set it to steps"
    own = {} if config.hf_deepspeed_config is None else config.hf_deepspeed_config.config
    for name, section in (("optim", "optimizer"), ("lr_scheduler_type", "scheduler")):
        if section in own and getattr(config, name) != default(config, name):
            yield f"{name}={getattr(config, name).value!r}", f"DeepSpeed's configuration has a {section} of its own"
