"""The only module that knows DeepSpeed: starting it, its ZeRO stages, gathering weights, keeping its trace.

An *engine* here is whatever wraps the model for training: a DeepSpeedEngine, DDP, or the model itself.
deepspeed is imported where it is used: it is slow to import, and nobody needs it who trains without it.
"""

import os
import socket
import sys
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
    if not deepspeed_config:
        return
    _own_programs_first()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    if use_cpu:
        import deepspeed

        # A way of reducing that training never takes. It needs a compiler, and where a rank dies while it is set up
        # the others wait for its shared memory without end.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False, timeout=timeout)


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


def stage(engine: nn.Module) -> int:
    """The ZeRO stage of the engine; 0 without DeepSpeed."""
    return engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0


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
        yield torch.distributed.get_world_size() > 1
    else:
        with _gathered(list(engine.module.parameters())), _coordinator(engine, _Resident()):
            yield False


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
    coordinator = _scoring_coordinator(_offload(engine))
    with _coordinator(engine, coordinator):
        yield engine
        drop_prefetched(engine)


def drop_prefetched(engine: nn.Module) -> None:
    """Let go of what ZeRO-3 has begun to gather for a forward that does not come; it could not be gathered by hand."""
    if stage(engine) == 3:
        _offload(engine).param_coordinator._clean_inflight_param_registry()


def forwards_to_make(engine: nn.Module, count: int) -> int:
    """`count`, or where a forward is a collective the largest count of any rank. Every rank calls it."""
    if stage(engine) < 3:
        return count
    return int(ranks.largest(count, next(engine.module.parameters()).device))


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


def load_universal(accelerator: Any) -> None:
    """Let the engine that is going to be made read a universal checkpoint."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config.setdefault("checkpoint", {})["load_universal"] = True


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
        assert piece.master is None or piece.master.data_ptr() != piece.weights.data_ptr(), piece.name
    return found


def _stage3_piece(engine: nn.Module, name: str, param: nn.Parameter) -> Piece:
    from deepspeed.utils import safe_get_local_fp32_param

    shard = param.ds_tensor
    trains = hasattr(engine.optimizer, "parameter_offload")  # an engine for inference has no masters
    offset = shard.ds_numel * torch.distributed.get_rank()
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
    rank's partition is gathered into the others' whole weights.
    """
    optimizer = getattr(engine, "optimizer", None)
    if stage(engine) == 3:
        _offload(engine).empty_partition_cache()
    yield
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
