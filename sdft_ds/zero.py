"""The only module that knows DeepSpeed: starting it, its ZeRO stages, gathering weights, keeping its trace.

An *engine* here is whatever wraps the model for training: a DeepSpeedEngine, DDP, or the model itself.
deepspeed is imported where it is used: it is slow to import, and nobody needs it who trains without it.
"""

import copy
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from sdft_ds import ranks

# What a launcher says, and accelerate for the rest of the process once a configuration has said it.
_USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_LAUNCHED_WITH_DEEPSPEED = _USE_DEEPSPEED in os.environ


def no_accelerator() -> bool:
    """True on a machine where only the CPU can train."""
    return not torch.accelerator.is_available()


def start_process_group(deepspeed_config: Any, use_cpu: bool, timeout_seconds: int) -> None:
    """Start DeepSpeed's process group where accelerate would not do it right, which it does without a configuration.

    On a CPU it has to exist before TrainingArguments builds accelerate's state: that starts torch's group but not
    deepspeed.comm, after which zero.Init believes that the world has one rank. Plain `python` becomes rank 0 of 1.
    """
    if use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also where DeepSpeed would find something else
    # Also for the groups that DeepSpeed makes itself, without saying how long they may wait.
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

        # A way of reducing that training never takes. It needs a compiler, and where a rank dies while it is set up
        # the others wait for its shared memory without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False, timeout=timeout)


def own_settings(args: Any) -> Any:
    """A trainer's copy of its settings, into which transformers, accelerate and we write; the caller's stay as they
    are. DeepSpeed's configuration, whose `auto` is filled in from the model, is a part of it.

    accelerate and transformers hold one state for the process, that of the settings that were made last: it becomes
    that of these.
    """
    own = object.__new__(type(args))  # not by copy, which leaves out what is not to be pickled
    vars(own).update(vars(args))
    shared = [name for name in ("accelerator_config", "hf_deepspeed_config", "deepspeed_plugin") if name in vars(args)]
    # Together, for the plugin holds the configuration.
    vars(own).update(copy.deepcopy({name: vars(args)[name] for name in shared}))
    vars(own).pop("_setup_devices", None)
    own._setup_devices  # noqa: B018  transformers' way of making the process's state
    _set_hf_config(own)
    return own


def _set_hf_config(args: Any) -> None:
    """What transformers asks whether to load a model sharded."""
    from transformers.integrations import deepspeed as integration

    if args.deepspeed:
        integration.set_hf_deepspeed_config(args.hf_deepspeed_config)
    elif args.deepspeed_plugin is not None:
        args.deepspeed_plugin.set_deepspeed_weakref()
    else:
        integration.unset_hf_deepspeed_config()


class ProcessState:
    """accelerate's and transformers' state of this process as it is when this is made, to be entered later, whatever
    other trainers and settings were made meanwhile."""

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


# model -> the DeepSpeed engine around it; weakly, for one that is gone has taken its hooks away.
_ENGINES: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def hold(model: nn.Module, engine: nn.Module) -> None:
    """Remember the DeepSpeed engine, if it is one, that has put its hooks on this model."""
    if hasattr(engine, "zero_optimization_stage") and not was_released(engine):
        _ENGINES[model] = weakref.ref(engine)


def release(model: nn.Module) -> None:
    """Take the hooks of a DeepSpeed engine that was made around this model away, so that another can be made."""
    engine = _ENGINES.pop(model, lambda: None)()
    if engine is None:
        return
    if stage(engine) == 3:
        _offload(engine).empty_partition_cache()
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    # It does the same again when it is collected, and would undo what the next engine has set on the parameters.
    engine.destroy = lambda: None
    engine.sdft_released = True


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(param, "ds_id") for param in model.parameters())


@contextmanager
def unsharded() -> Iterator[None]:
    """Inside, transformers and PEFT make whole weights, also under a configuration of ZeRO-3."""
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = config


def refuse_sharded(model: nn.Module, accelerator: Any) -> None:
    """Raises ValueError for a model whose weights ZeRO-3 has sharded, where this run has no ZeRO-3."""
    if configured_stage(accelerator) != 3 and is_sharded(model):
        raise ValueError(
            "The model's weights are sharded by ZeRO-3, of another trainer or of the configuration that it was loaded "
            "under, and this run is not at stage 3: save that model, and load it for this run."
        )


def was_released(engine: nn.Module) -> bool:
    return hasattr(engine, "sdft_released")


@contextmanager
def config_kept(accelerator: Any) -> Iterator[None]:
    """Afterwards DeepSpeed's configuration is as it was: transformers takes out of it what inference does not need."""
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
    """DeepSpeed's configuration, of which a file, a dict or its JSON is given, with what it leaves out taken from the
    arguments: batch sizes, clipping, precision, and the hyperparameters of a plain optimizer or scheduler of its own.

    Raises ValueError for what cannot be read.
    """
    if not given:
        return None
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    try:
        config = HfDeepSpeedConfig(given).config  # of a dict it makes a copy
    except (ValueError, OSError, AttributeError) as error:
        raise ValueError(f"deepspeed: a file, or a dict, with DeepSpeed's configuration is needed: {error}") from None
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

    # What transformers does as well, but not before there is a trainer.
    config = HfTrainerDeepSpeedConfig(plugin.hf_ds_config.config)
    config.trainer_config_process(args)
    plugin.hf_ds_config, plugin.deepspeed_config = config, config.config
    return config


@contextmanager
def naming_the_port() -> Iterator[None]:
    """Raises ValueError, with the remedy, where the port of a process group that is made inside is taken."""
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
    """JIT operators are built with ninja from the environment of this interpreter, activated or not."""
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")


def build_operator() -> str:
    """Build the operator that offloaded optimizers need, or load it where it is built; its name. Raises what
    DeepSpeed and torch raise where it cannot be built.
    """
    _own_programs_first()
    if no_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    builder.load()
    return builder.name


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stage(engine: nn.Module) -> int:
    """The ZeRO stage of the engine; 0 without DeepSpeed."""
    return engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0


def model_in(engine: nn.Module) -> nn.Module:
    """The model that the engine wraps."""
    wraps = isinstance(engine, nn.parallel.DistributedDataParallel) or hasattr(engine, "zero_optimization_stage")
    return engine.module if wraps else engine


def full_shape(param: Tensor) -> torch.Size:
    """The shape of the whole parameter, of which a rank may hold a shard."""
    return getattr(param, "ds_shape", param.shape)


@torch.no_grad()
def full_copies(params: list[Tensor]) -> list[Tensor]:
    """Copies of whole parameters on this rank. Every rank must call it."""
    with _gathered(params):
        return [param.detach().clone() for param in params]


@contextmanager
def _gathered(params: list[Tensor]) -> Iterator[None]:
    sharded = [param for param in params if hasattr(param, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


class _Resident:
    """Stands in for ZeRO-3's parameter coordinator while all weights are gathered: there is nothing to fetch."""

    def reset_step(self) -> None: ...

    def trace_prologue(self, sub_module: nn.Module) -> None: ...

    def is_record_trace(self) -> bool:
        return False

    def fetch_sub_module(self, sub_module: nn.Module, forward: bool) -> None: ...

    def release_sub_module(self, sub_module: nn.Module, forward: bool = False) -> None: ...


@contextmanager
def _coordinator(engine: nn.Module, coordinator: Any) -> Iterator[None]:
    """ZeRO-3 fetches through the given coordinator inside, and through its own again afterwards, whatever happens."""
    offload = _offload(engine)
    own, offload.param_coordinator = offload.param_coordinator, coordinator
    try:
        yield
    finally:
        offload.param_coordinator = own


@contextmanager
def generation_weights(engine: nn.Module, gather: bool) -> Iterator[bool]:
    """The model inside the engine can generate within; yields whether every rank must go on until the last is done.

    ZeRO-3 with `gather`: all weights are gathered once and its hooks idle, so ranks may differ in the number and the
    length of their calls. Without: each layer is gathered for each token, and all ranks go on until the last is done.
    """
    if stage(engine) < 3:
        yield False
    elif not gather:
        with _recovering(engine):
            yield ranks.count() > 1
    else:
        with (
            _gathered(list(engine.module.parameters())),
            _coordinator(engine, _Resident()),
            _recovering(engine, release=False),
        ):
            yield False


@contextmanager
def _recovering(engine: nn.Module, release: bool = True) -> Iterator[None]:
    """After an exception in one of ZeRO-3's forwards inside, no module is in a forward any more. release: and the
    weights that it gathered, or had begun to gather, are let go."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    except BaseException:
        del FWD_MODULE_STACK[depth:]
        for module in engine.module.modules():
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = False  # or it gathers each parameter that is looked at
        if release:
            _offload(engine).empty_partition_cache()
        raise


@contextmanager
def scoring_pass(engine: nn.Module) -> Iterator[nn.Module]:
    """Forwards that no backward follows, of the module that is yielded.

    DDP is left out: it would exchange buffers with the other ranks in each forward. ZeRO-3 must not mix them up with
    the order of a training step: its coordinator learns the order of modules over one forward and backward, and
    prefetches by it. A second coordinator, with the same settings, learns the order of these forwards.
    """
    if stage(engine) < 3:
        yield engine.module if isinstance(engine, nn.parallel.DistributedDataParallel) else engine
        return
    offload = _offload(engine)
    with _coordinator(engine, _scoring_coordinator(offload)), _recovering(engine):
        try:
            yield engine
            drop_prefetched(engine)
        except BaseException:
            del offload.sdft_scoring_coordinator  # it holds half an order; the next one learns the whole
            raise


def drop_prefetched(engine: nn.Module) -> None:
    """Let go of what ZeRO-3 has begun to gather for a forward that does not come; it could not be gathered by hand."""
    if stage(engine) == 3:
        _offload(engine).param_coordinator._clean_inflight_param_registry()


def forward_is_collective(engine: nn.Module) -> bool:
    """Whether each forward gathers weights from the other ranks, so that all ranks have to make as many."""
    return stage(engine) == 3 and ranks.count() > 1


@contextmanager
def gathered_on_save(engine: nn.Module) -> Iterator[None]:
    """Inside, the whole weights are gathered where the model is saved; ZeRO-3's configuration may leave that out."""
    if stage(engine) < 3:
        yield
        return
    config = engine._config.zero_config
    configured, config.gather_16bit_weights_on_model_save = config.gather_16bit_weights_on_model_save, True
    try:
        yield
    finally:
        config.gather_16bit_weights_on_model_save = configured


def configured_stage(accelerator: Any) -> int | None:
    """The stage of the engine that is going to be made; None without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return None if plugin is None else plugin.zero_stage


def configure_accumulation(accelerator: Any, steps: int) -> None:
    """Let the engine that is going to be made accumulate `steps` micro-batches. Without DeepSpeed the loop does."""
    if configured_stage(accelerator) is None:
        return
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_accumulation_steps"] = steps
    config["train_batch_size"] = steps * config["train_micro_batch_size_per_gpu"] * accelerator.num_processes


def engine_precision(accelerator: Any, model: nn.Module) -> AbstractContextManager[None]:
    """In place of an engine, which would hold the weights in half precision: autocast, where they are in fp32."""
    dtype, param = accelerator.state.deepspeed_plugin.hf_ds_config.dtype(), next(model.parameters())
    if dtype == torch.float32 or param.dtype != torch.float32:
        return nullcontext()
    return torch.autocast(param.device.type, dtype)


def load_universal(accelerator: Any) -> None:
    """Let the engine that is going to be made read a universal checkpoint."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config.setdefault("checkpoint", {})["load_universal"] = True


def read_universal(engine: nn.Module, universal: bool) -> None:
    """Let the engine that stands read its next checkpoint in the universal form, or as it was saved."""
    engine._config.load_universal_checkpoint = universal


def mend_universal(engine: nn.Module, folder: str) -> None:
    """Put right what DeepSpeed's ZeRO-3 leaves wrong after it has read a universal checkpoint from `folder`: all its
    parameters count their steps in one and the same tensor, and all groups have the first one's hyperparameters."""
    if stage(engine) < 3 or not engine.load_universal_checkpoint():
        return
    optimizer = engine.optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    shards = Path(folder, Path(folder, "latest_universal").read_text().strip())
    # DeepSpeed's own file, a pickle as its others are.
    saved = torch.load(shards / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    for group, values in zip(optimizer.param_groups, saved["optimizer_state_dict"]["param_groups"], strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})


def set_rate(scheduler: Any) -> None:
    """Let a schedule of DeepSpeed's own set the rate of the step where it stands; to another's nothing happens."""
    if hasattr(scheduler, "last_batch_iteration"):
        scheduler.step(scheduler.last_batch_iteration)


def use_within(module: nn.Module, params: list[Tensor]) -> None:
    """Let the module's own forward compute with parameters of modules inside it: ZeRO-3 gathers them for it."""
    inside = {id(param) for param in module.parameters(recurse=False)}
    for param in params:
        if hasattr(param, "ds_id") and id(param) not in inside:
            import deepspeed

            deepspeed.zero.register_external_parameter(module, param)


def around_optimizer_step(engine: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
    """Run every optimizer step inside a context. DeepSpeed's is a part of its backward; for other engines, which leave
    it to their caller, nothing happens."""
    if not hasattr(engine, "zero_optimization_stage"):
        return
    plain = engine.step
    unchecked = stage(engine) == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled())

    def step(*args: Any, **kwargs: Any) -> Any:
        with context(), _checked(engine) if unchecked else nullcontext():
            return plain(*args, **kwargs)

    engine.step = step


@contextmanager
def _checked(engine: nn.Module) -> Iterator[None]:
    """Inside, the engine's optimizer leaves a step out whose gradient is not finite, and says so in `overflow`: stage
    0 in fp32 is the one case in which DeepSpeed takes any gradient."""
    optimizer = engine.optimizer
    grads = [param.grad for param in engine.parameters() if param.grad is not None]
    boundary = engine.is_gradient_accumulation_boundary()
    optimizer.overflow = boundary and not bool(torch.nn.utils.get_total_norm(grads).isfinite())
    own = optimizer.step
    if optimizer.overflow:
        optimizer.step = lambda *args, **kwargs: None
    try:
        yield
    finally:
        optimizer.step = own


def step_was_skipped(engine: nn.Module) -> bool:
    """Whether DeepSpeed left the last optimizer step out, because its gradient was not finite."""
    return bool(getattr(getattr(engine, "optimizer", None), "overflow", False))


def drop_gradients(engine: nn.Module) -> None:
    """Leave no gradients, so that an optimizer step that follows changes nothing, momentum and decay included."""
    for param in engine.parameters():
        param.grad = None


def _offload(engine: nn.Module) -> Any:
    """What holds ZeRO-3's coordinator: a part of the optimizer, or all there is in an engine for inference."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def _scoring_coordinator(offload: Any) -> Any:
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    if not hasattr(offload, "sdft_scoring_coordinator"):
        offload.sdft_scoring_coordinator = PartitionedParameterCoordinator(
            prefetch_bucket_sz=offload._prefetch_bucket_sz,
            max_reuse_distance_in_numel=offload._max_reuse_distance_in_numel,
            max_available_parameters_in_numel=offload._max_available_parameters_in_numel,
            allgather_stream=offload._DeepSpeedZeRoOffload__allgather_stream,
            inflight_param_registry=offload._DeepSpeedZeRoOffload__inflight_param_registry,
            prefetch_nvme=getattr(offload.offload_device, "value", None) == "nvme",
            timers=offload.timers,
            zero_quantized_weights=offload.zero_quantized_weights,
            zero_quantized_nontrainable_weights=offload.zero_quantized_nontrainable_weights,
            fast_sharding_for_leaf_module=offload.fast_sharding_for_leaf_module,
            log_trace_cache_warnings=offload.log_trace_cache_warnings,
        )
    return offload.sdft_scoring_coordinator


@dataclass(frozen=True)
class Piece:
    """This rank's part of one trainable parameter, flat: elements offset ... offset + len(weights) of the whole.

    weights: what the forward computes with, once `rewritten` has shown it to the other ranks. master: the fp32 values
    that the optimizer trains; None where the weights themselves are those.
    """

    name: str
    offset: int
    weights: Tensor
    master: Tensor | None

    @property
    def values(self) -> Tensor:
        return self.weights if self.master is None else self.master


def pieces(engine: nn.Module, trainable: list[tuple[str, nn.Parameter]]) -> list[Piece]:
    """This rank's pieces of the given parameters, as of now: views into the engine, not to be kept over a step."""
    if stage(engine) == 3:
        found = [_stage3_piece(engine, name, param) for name, param in trainable]
    elif stage(engine) > 0:
        found = [_fragment_piece(name, param) for name, param in trainable if param._hp_mapping is not None]
    else:
        masters = _masters_by_param(engine)
        found = [Piece(name, 0, param.data.view(-1), masters.get(id(param))) for name, param in trainable]
    for piece in found:
        if piece.master is not None and piece.master.data_ptr() == piece.weights.data_ptr():
            raise RuntimeError(
                f"{piece.name}: DeepSpeed trains the weights that the forward computes with, and has no master from "
                "which the student could be put back after a teacher's pass. Use teacher_model_kind='live'."
            )
    return found


def _stage3_piece(engine: nn.Module, name: str, param: nn.Parameter) -> Piece:
    from deepspeed.utils import safe_get_local_fp32_param

    shard = param.ds_tensor
    trains = hasattr(engine.optimizer, "parameter_offload")  # an engine for inference has no masters
    offset = shard.ds_numel * param.ds_zero_partition_rank  # among those that share it, which may be few of all ranks
    return Piece(name, offset, shard.data, safe_get_local_fp32_param(param) if trains else None)


def _fragment_piece(name: str, param: nn.Parameter) -> Piece:
    fragment = param._hp_mapping
    return Piece(name, fragment.lp_fragment_address.start, fragment.lp_fragment.data, fragment.hp_fragment.data)


def _masters_by_param(engine: nn.Module) -> dict[int, Tensor]:
    """Stage 0 in half precision: whole fp32 masters, one for each parameter or flat for a group of them."""
    optimizer = getattr(engine, "optimizer", None)
    masters = {}
    for g, params in enumerate(getattr(optimizer, "fp16_groups", [])):
        if hasattr(optimizer, "fp32_groups_flat"):
            whole, start = optimizer.fp32_groups_flat[g].data, 0
            for param in params:
                masters[id(param)] = whole[start : start + param.numel()]
                start += param.numel()
        else:
            masters |= {
                id(param): master.data.view(-1) for param, master in zip(params, optimizer.fp32_groups[g], strict=True)
            }
    return masters


@contextmanager
def rewritten(engine: nn.Module) -> Iterator[None]:
    """Write to the weights of pieces inside; afterwards every forward on every rank sees them.

    At stage 3 whole parameters may be cached, and hpZ keeps a copy of every shard in the node; both would be computed
    with as they were, so the cache is emptied first and the copies are dropped afterwards. At stages 1 and 2 each
    rank's partition is gathered into the others' whole weights. After an exception as well: what was written until
    then is the same on every rank.
    """
    if stage(engine) == 3:
        _offload(engine).empty_partition_cache()
    try:
        yield
    finally:
        _publish(engine)


def _publish(engine: nn.Module) -> None:
    """Let every forward on every rank see what was written to the weights of pieces."""
    optimizer = getattr(engine, "optimizer", None)
    if stage(engine) == 3 and hasattr(optimizer, "invalidate_secondary_tensor"):
        optimizer.invalidate_secondary_tensor()
    if stage(engine) in (1, 2):
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
    # ZeRO-3 gathers on a stream of its own, which does not wait for what this one has written.
    if torch.accelerator.is_available():
        torch.accelerator.current_stream().synchronize()
