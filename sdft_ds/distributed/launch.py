"""Process startup: CUDA, process group, accelerate's and transformers' global state, DeepSpeed's configuration.

Patches torch.distributed's default timeouts and DeepSpeed's list of compatible operators.
"""

import copy
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

# Set by launchers, and by accelerate for the rest of the process once a DeepSpeed configuration was used.
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"


_LAUNCHED_WITH_DEEPSPEED = _USE_DEEPSPEED in os.environ


def no_accelerator() -> bool:
    """Whether this machine has no accelerator, so that only the CPU can train."""
    return not torch.accelerator.is_available()


def hide_deprecations() -> None:
    """Hide that DeepSpeed uses deprecated names of torch, in every step, which users cannot fix."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def avoid_cudnn_attention() -> None:
    """Switch off cuDNN's attention, which torch prefers on Hopper and newer: it builds an execution plan for each new
    shape, and every decoded token is one. Measured on an H200 with torch 2.11+cu130: 36 ms for each new shape in
    decoding and 95 ms in training, against 0.08 and 0.3 ms with torch's other kernels."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # should other code switch it on again


# Variables by which users configure torch's allocator.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def expand_segments(enabled: bool) -> None:
    """Let torch's allocator grow its segments, unless the user has configured it: the shapes of rollouts and
    micro-batches change all the time, and what is freed of one shape would not fit another. Not by the environment,
    which torch reads when it is imported."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{enabled}")


def multiply_in_tf32(enabled: bool) -> None:
    """Whether matrix products of fp32 operands take TF32 on a GPU: 10 bits instead of 23, several times as fast."""
    torch.set_float32_matmul_precision("high" if enabled else "highest")


def start_process_group(deepspeed_config: Any, use_cpu: bool, timeout_seconds: int) -> None:
    """Start DeepSpeed's process group where accelerate would do it wrong; without DeepSpeed, accelerate does it right.

    On a CPU it has to exist before TrainingArguments builds accelerate's state: that starts torch's group but not
    deepspeed.comm, after which zero.Init assumes a world size of 1. Plain `python` becomes rank 0 of 1.
    """
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # even if DeepSpeed would detect an accelerator
    # Patched to reach the groups that DeepSpeed creates itself without a timeout.
    timeout = timedelta(seconds=timeout_seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if not deepspeed_config and not _LAUNCHED_WITH_DEEPSPEED:  # left by an earlier configuration
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        os.environ.pop(_USE_DEEPSPEED, None)
        unset_hf_deepspeed_config()
        return
    _own_programs_first()
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ.update(alone)
    if use_cpu:
        import deepspeed

        # An all-reduce that training never uses. It needs a compiler, and if a rank dies during its setup, the others
        # wait forever for its shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False, timeout=timeout)


def own_settings(args: Any) -> Any:
    """A trainer's copy of its settings, which transformers, accelerate and we modify; the caller's are not modified.
    Includes DeepSpeed's configuration, whose `auto` values are filled in from the model.

    accelerate and transformers have one global state per process, set by the settings built last; this sets it to that
    of the copy.
    """
    own = object.__new__(type(args))  # not copy.copy, which omits what is not to be pickled
    vars(own).update(vars(args))
    shared = [name for name in ("accelerator_config", "hf_deepspeed_config", "deepspeed_plugin") if name in vars(args)]
    # In one deepcopy, because the plugin references the configuration.
    vars(own).update(copy.deepcopy({name: vars(args)[name] for name in shared}))
    vars(own).pop("_setup_devices", None)
    own._setup_devices  # noqa: B018  makes transformers set up the process state
    _set_hf_config(own)
    return own


def _set_hf_config(args: Any) -> None:
    """Set the global configuration by which transformers decides whether to load a model sharded."""
    from transformers.integrations import deepspeed as integration

    if args.deepspeed:
        integration.set_hf_deepspeed_config(args.hf_deepspeed_config)
    elif args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    else:
        integration.unset_hf_deepspeed_config()


class ProcessState:
    """Snapshot of this process's accelerate and transformers state, to be restored temporarily later, after other
    trainers and settings were built."""

    def __init__(self, args: Any, accelerator: Any):
        self.args = args
        self.shared = [(vars(state), dict(vars(state))) for state in (args.distributed_state, accelerator.state)]

    @contextmanager
    def entered(self) -> Iterator[None]:
        before = [(shared, dict(shared)) for shared, _ in self.shared]
        with unsharded():  # which puts transformers' configuration back
            self._set(self.shared)
            _set_hf_config(self.args)
            try:
                yield
            finally:
                self._set(before)

    @staticmethod
    def _set(states: list[tuple[dict, dict]]) -> None:
        for shared, values in states:
            shared.clear()
            shared.update(values)


@contextmanager
def unsharded() -> Iterator[None]:
    """Inside, transformers and PEFT create unsharded weights, even under a ZeRO-3 configuration."""
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config


@contextmanager
def config_kept(accelerator: Any) -> Iterator[None]:
    """Restores DeepSpeed's configuration on exit: transformers removes from it what inference does not need."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    config = plugin.hf_ds_config.config
    before = copy.deepcopy(config)
    try:
        yield
    finally:
        config.clear()
        config.update(before)


def complete_configuration(given: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration (given as a file, a dict, JSON, or the name of one in ds_configs), with missing values
    set to `auto`, which takes them from the arguments: batch sizes, clipping, precision, and hyperparameters of
    DeepSpeed's plain optimizers and schedulers.

    Raises ValueError if it cannot be read.
    """
    if not given:
        return None
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    try:
        config = HfDeepSpeedConfig(_own_file(given) or given).config  # copies a dict
    except (ValueError, OSError, AttributeError) as error:
        names = ", ".join(sorted(_own_configurations()))
        raise ValueError(
            f"deepspeed: a file, or a dict, with DeepSpeed's configuration is needed, or one of {names}: {error}"
        ) from None
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.setdefault(name, "auto")
    config.setdefault("gradient_clipping", "auto")
    for name in ("bf16", "fp16"):
        config.setdefault(name, {}).setdefault("enabled", "auto")
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    for section in ("optimizer", "scheduler"):
        own = config.get(section, {})
        for name in _TAKEN_FROM_ARGUMENTS.get(own.get("type"), ()):
            own.setdefault("params", {}).setdefault(name, "auto")
    return config


def _own_configurations() -> dict[str, Path]:
    """name -> file of the configurations that come along: in the package, or beside it in a clone."""
    package = Path(__file__).parents[1]
    folder = next(each / "ds_configs" for each in (package, package.parent) if (each / "ds_configs").is_dir())
    return {file.stem: file for file in folder.glob("*.json")}


def _own_file(given: Any) -> str | None:
    """The file of `zero2`, and of `ds_configs/zero2.json` in a folder that has no such file."""
    if not isinstance(given, str) or Path(given).exists():
        return None
    own = re.fullmatch(r"(\w+)|ds_configs/(\w+)\.json", given)
    file = own and _own_configurations().get(own[1] or own[2])
    return file and str(file)


# type of DeepSpeed's own optimizer or scheduler -> its parameters that transformers fills in from the arguments
_TAKEN_FROM_ARGUMENTS = {
    **{name: ("lr", "betas", "eps", "weight_decay") for name in ("Adam", "AdamW")},
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"),
}


def configuration_in_effect(args: Any) -> Any:
    """DeepSpeed's configuration of a run with these arguments, as transformers' HfTrainerDeepSpeedConfig: that of
    `deepspeed`, or the one that accelerate's launcher has set; None without DeepSpeed."""
    plugin = args.deepspeed_plugin
    if plugin is None or args.deepspeed:
        return plugin and plugin.hf_ds_config
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    # transformers does the same, but not before a trainer is built.
    config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    config.trainer_config_process(args)
    plugin.hf_ds_config, plugin.deepspeed_config = config, config.config
    return config


@contextmanager
def naming_the_port() -> Iterator[None]:
    """Raises ValueError, with the remedy, if the port of a process group created inside is taken."""
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken by another program on this machine: set another "
            "(--master_port of torchrun and deepspeed, --main_process_port of accelerate launch)."
        ) from None


def _own_programs_first() -> None:
    """Put this interpreter's environment first in PATH, even if not activated: JIT operators are built with ninja."""
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def build_operator() -> str:
    """Build the operator for offloaded optimizers, or load it if it is built; returns its name. Raises whatever
    DeepSpeed and torch raise if the build fails.
    """
    _own_programs_first()
    if no_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    builder.load()
    return builder.name


def free_port() -> int:
    """A port of this machine that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configured_stage(accelerator: Any) -> int | None:
    """The ZeRO stage of the engine to be created; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


def is_configured(accelerator: Any) -> bool:
    """Whether the engine to be created is DeepSpeed's."""
    return configured_stage(accelerator) is not None


def shards_weights(accelerator: Any) -> bool:
    """Whether the engine to be created will shard the weights across ranks."""
    return configured_stage(accelerator) == 3


@dataclass(frozen=True)
class Sharding:
    """How optimizer state is sharded across ranks. stage: None without DeepSpeed."""

    stage: int | None
    ranks: int

    def __str__(self) -> str:
        return "without DeepSpeed" if self.stage is None else f"at ZeRO stage {self.stage}"

    def can_read(self, saved: "Sharding") -> bool:
        """Whether a run with this sharding can load optimizer state saved with another one, in any form."""
        return saved.stage == self.stage or {saved.stage, self.stage} == {1, 2}

    def differs_from(self, saved: "Sharding") -> bool:
        """Whether saved state must be resharded, via a universal checkpoint. At stage 0 every rank has all of it."""
        return saved.stage != self.stage or bool(self.stage and saved.ranks != self.ranks)


def configure_accumulation(accelerator: Any, steps: int) -> None:
    """Make the engine to be created accumulate `steps` micro-batches. Without DeepSpeed the training loop does."""
    if configured_stage(accelerator) is None:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_accumulation_steps"] = steps
    config["train_batch_size"] = steps * config["train_micro_batch_size_per_gpu"] * accelerator.num_processes


def load_universal(accelerator: Any) -> None:
    """Make the engine to be created load a universal checkpoint."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config.setdefault("checkpoint", {})["load_universal"] = True
