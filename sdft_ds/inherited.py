"""What of transformers', accelerate's and DeepSpeed's settings cannot work here, or changes nothing, and what to do
instead.

All other settings that SDFTConfig inherits do what transformers says they do.
"""

import os
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from accelerate.state import AcceleratorState
from transformers import Trainer
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

# Read by methods of transformers' Trainer that are replaced here: warned about, not refused, because scripts that come
# from there set them.
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
# The same, of accelerator_config.
IGNORED_BY_ACCELERATE = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking")

_WHOLE_LAYERS = "each rank computes whole rows with whole layers. Leave it unset: ZeRO (deepspeed) shards the weights"
_COMPILED = (
    "the loss is computed inside the model's forward, of which no compiler knows. Leave it unset: "
    "cache_implementation='static' compiles the decode step of rollouts on a GPU"
)
_FULL_EVAL = (
    "it would leave the weights in half precision. Leave it False: evaluations compute in the precision of training"
)
_GRADIENT_PROJECTION = "GaLore and APOLLO are not supported. Leave it unset: use_peft trains fewer weights"
# Refused elsewhere than at their default.
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
    "ignore_data_skip": "a resume goes on with the next row, which takes no time. Leave it False",
    "save_on_each_node": "all ranks write one checkpoint, in a folder that the nodes share. Leave it False",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 save in any case, on all ranks together. Leave it False",
}
# What accelerate's launcher says in the environment -> what it must not be, and why.
REFUSED_OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("true", _WHOLE_LAYERS),
    "ACCELERATE_USE_MEGATRON_LM": ("true", _WHOLE_LAYERS),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", _WHOLE_LAYERS),
    "ACCELERATE_MIXED_PRECISION": ("fp8", "the loss is not made for it. Use bf16"),
}
# Their step is not one of the weights that forwards see: it happens within backward, where one that is not finite
# could not be left out, or other weights are kept for rollouts and checkpoints.
REFUSED_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
# Those that accelerate has a counterpart of in host memory. In the place of any other it takes Adam, without a word.
OFFLOADED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")

# How launchers tell each process how many they start.
COUNTS_OF_PROCESSES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

# Arguments of transformers' and TRL's trainers that SDFTTrainer does not have.
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


def default(config: Any, name: str) -> Any:
    """The default of a setting, as its field has it."""
    field = type(config).__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()


def refuse_lone_processes() -> None:
    """Raises ValueError where several processes were started and none is told of the others: each would be rank 0 of
    1, and all of them would train the same on the first GPU."""
    if "RANK" in os.environ:
        return
    for name in COUNTS_OF_PROCESSES:
        count = os.environ.get(name, "1")
        if count.isdigit() and int(count) > 1:
            raise ValueError(
                f"{count} processes were started ({name}), and each believes to be alone, for RANK is not set: start "
                "them with torchrun or deepspeed; or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
                "for each, as launch/slurm/train.sbatch does."
            )


def refuse_arguments(arguments: dict[str, Any]) -> None:
    """Raises TypeError for arguments that SDFTTrainer does not have, with the remedy for those of other trainers."""
    for name in arguments:
        reason = REFUSED_ARGUMENTS.get(name, "there is no such argument")
        raise TypeError(f"SDFTTrainer does not take {name}: {reason}.")


def refuse_settings(config: Any) -> None:
    """Raises ValueError for settings of transformers and accelerate that cannot work."""
    for name, reason in REFUSED_FIELDS.items():
        if getattr(config, name) not in (default(config, name), False):
            value = " ".join(str(getattr(config, name)).split())
            raise ValueError(f"{name}={value} is not supported: {reason}.")
    for name, (refused, reason) in REFUSED_OF_ACCELERATE.items():
        if os.environ.get(name, "").lower() == refused:
            raise ValueError(f"accelerate's configuration, {name}={refused}, is not supported: {reason}.")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(f"accelerate's configuration, ACCELERATE_DYNAMO_BACKEND, is not supported: {_COMPILED}.")
    if AcceleratorState._shared_state:  # else it is emptied for each configuration
        raise ValueError(
            "accelerator_config: use_configured_state is not supported: it keeps the state of an Accelerator that was "
            "made before. Leave it out."
        )
    if "num_steps" in (config.accelerator_config.gradient_accumulation_kwargs or {}):
        raise ValueError("accelerator_config: num_steps is not supported: set gradient_accumulation_steps.")
    if config.full_determinism and not config.use_cpu:
        raise ValueError(
            "full_determinism=True is not supported on a GPU: sampling sums probabilities, which CUDA does in no "
            "deterministic way. Leave it False: draws follow from the seed in any case."
        )
    if config.use_liger_kernel:
        _refuse_liger(config)
    _refuse_optimizer(config)
    available = get_available_reporting_integrations()
    for tracker in config.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to: there is no {tracker!r}; there are {', '.join(INTEGRATION_TO_CALLBACK)}.")
        if tracker not in (*available, "azure_ml", "flyte"):  # transformers does not look for these two
            raise ValueError(f"report_to: {tracker} is not installed: pip install {tracker}, or leave it out.")


def _refuse_liger(config: Any) -> None:
    kernels = config.liger_kernel_config or {}
    if kernels.get("fused_linear_cross_entropy", True) or kernels.get("cross_entropy", False):
        raise ValueError(
            "use_liger_kernel=True would replace the model's forward, which computes the loss, by one for cross "
            'entropy: set liger_kernel_config={"fused_linear_cross_entropy": False, "cross_entropy": False}.'
        )
    if config.use_cpu or not is_liger_kernel_available():
        raise ValueError("use_liger_kernel=True needs a GPU, and pip install liger-kernel. Or leave it False.")


def _refuse_optimizer(config: Any) -> None:
    name = config.optim.value
    if name.startswith(REFUSED_OPTIMIZERS):
        raise ValueError(
            f"optim={name} is not supported: its steps are not those of the weights that forwards see. Use "
            "adamw_torch; an adapter (use_peft) trains fewer weights."
        )
    try:
        Trainer.get_optimizer_cls_and_kwargs(config)
    except (ImportError, ValueError) as error:
        raise ValueError(f"optim={name} cannot be used: {' '.join(str(error).split())}") from None


def refuse_in_deepspeed(config: Any) -> None:
    """Raises ValueError for what DeepSpeed's configuration in effect asks for and cannot work."""
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
    """(key, why and what to do instead) of each."""
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
                "below stage 2 its optimizer keeps weights that cannot be swapped. Leave it out, or take stage 2",
            )
    for what in ("offload_param", "offload_optimizer"):
        if get(f"zero_optimization.{what}.device") == "nvme":
            yield (
                f'zero_optimization.{what}.device="nvme"',
                'such runs hang at start, or resume from the weights of the start. Write "cpu"',
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
            f"Adam would run in the place of optim={config.optim.value}. Set optim to one of "
            f"{', '.join(OFFLOADED_OPTIMIZERS)}, or do not offload the optimizer",
        )


def idle_settings(config: Any) -> Iterator[tuple[str, str]]:
    """(what was set, why it changes nothing) of inherited settings."""
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
    own = {} if config.hf_deepspeed_config is None else config.hf_deepspeed_config.config
    for name, section in (("optim", "optimizer"), ("lr_scheduler_type", "scheduler")):
        if section in own and getattr(config, name) != default(config, name):
            yield f"{name}={getattr(config, name).value!r}", f"DeepSpeed's configuration has a {section} of its own"
