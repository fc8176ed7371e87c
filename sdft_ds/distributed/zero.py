"""Weights under ZeRO: gathering, forwards outside the training step, local shards. Patches ZeRO-3's coordinator, its
hooks, and torch.nn.functional.linear.

deepspeed is imported where it is used: it is slow to import, and not needed without DeepSpeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdft_ds.distributed import engines, launch, ranks


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(param, "ds_id") for param in model.parameters())


def refuse_sharded(model: nn.Module, accelerator: Any) -> None:
    """Raises ValueError for a model with ZeRO-3 sharded weights in a run without ZeRO-3."""
    if launch.configured_stage(accelerator) != 3 and is_sharded(model):
        raise ValueError(
            "The model's weights are sharded by ZeRO-3, of another trainer or of the configuration that it was loaded "
            "under, and this run is not at stage 3: save that model, and load it for this run."
        )


def full_shape(param: Tensor) -> torch.Size:
    """The shape of the unsharded parameter."""
    return getattr(param, "ds_shape", param.shape)


@torch.no_grad()
def full_copies(params: list[Tensor]) -> list[Tensor]:
    """Unsharded copies of parameters on this rank. Must be called by every rank."""
    with gathered(params):
        return [param.detach().clone() for param in params]


@contextmanager
def gathered(params: list[Tensor]) -> Iterator[None]:
    """Inside, ZeRO-3 sharded parameters are whole on every rank; those that already were stay so on exit. Must be
    entered by every rank."""
    sharded = [param for param in params if hasattr(param, "ds_id") and param.ds_status.name != "AVAILABLE"]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


@contextmanager
def _without_hooks(engine: nn.Module) -> Iterator[None]:
    """Inside, a forward runs none of ZeRO-3's code: modules have neither its hooks nor its dictionaries of parameters,
    and torch.nn.functional.linear is PyTorch's own.

    All of it does nothing for weights that stay gathered, and takes longer than the rest of a decoded token. On exit
    every hook is in its place again, so that the coordinator's trace remains valid.
    """
    import torch.nn.functional as F
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    offload = engines.parameter_offload(engine)
    handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
    handles += [engine.module_forward_pre_hook, engine.module_forward_post_hook]
    ids = {handle.id for handle in handles}
    registries = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
    hooks_before = [(hooks, dict(hooks)) for hooks in registries.values()]
    parameters_before = [(module, module._parameters) for module in engine.module.modules()]
    linear = F.linear
    for hooks, _ in hooks_before:
        for key in ids & hooks.keys():
            del hooks[key]
    for module, parameters in parameters_before:
        module._parameters = dict(parameters)
    if linear is zero3_linear_wrap:
        F.linear = InsertPostInitMethodToModuleSubClasses.linear_bk
    try:
        yield
    finally:
        F.linear = linear
        for module, parameters in parameters_before:
            module._parameters = parameters
        for hooks, before in hooks_before:
            others = dict(hooks)  # may have been added or removed inside
            hooks.clear()
            hooks.update({key: hook for key, hook in before.items() if key in ids or key in others} | others)


@contextmanager
def _coordinator(engine: nn.Module, coordinator: Any) -> Iterator[None]:
    """Replace ZeRO-3's parameter coordinator inside; its own is restored on exit, also after an exception."""
    offload = engines.parameter_offload(engine)
    own, offload.param_coordinator = offload.param_coordinator, coordinator
    try:
        yield
    finally:
        offload.param_coordinator = own


@contextmanager
def generation_weights(engine: nn.Module, gather: bool) -> Iterator[bool]:
    """Context in which the engine's model can generate; yields whether all ranks must continue until the last is done.

    ZeRO-3 with `gather`: all weights are gathered once and its hooks removed meanwhile, so ranks may differ in the
    number and length of their calls. Without: each layer is gathered for each token, and all ranks continue until the
    last is done.
    """
    if engines.stage(engine) < 3:
        yield False
    elif not gather:
        with _recovering(engine):
            yield ranks.world_size() > 1
    else:
        with gathered(list(engine.module.parameters())), _without_hooks(engine):
            yield False


@contextmanager
def _recovering(engine: nn.Module) -> Iterator[None]:
    """After an exception in a ZeRO-3 forward inside, reset its record of modules in a forward, and free the weights
    that were gathered or being gathered."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    except BaseException:
        del FWD_MODULE_STACK[depth:]
        for module in engine.module.modules():
            if hasattr(module._parameters, "_in_forward"):
                module._parameters._in_forward = False  # or any access to a parameter gathers it
        engines.parameter_offload(engine).empty_partition_cache()
        raise


@contextmanager
def scoring_pass(engine: nn.Module) -> Iterator[nn.Module]:
    """Yields the module to call for forwards without a backward.

    DDP is bypassed: it would synchronize buffers across ranks in each forward. ZeRO-3 must not mix these forwards up
    with a training step: its coordinator records the order of modules over one forward and backward, and prefetches by
    it. A second coordinator, with the same settings, records the order of these forwards.
    """
    if engines.stage(engine) < 3:
        yield engine.module if isinstance(engine, nn.parallel.DistributedDataParallel) else engine
        return
    offload = engines.parameter_offload(engine)
    with _coordinator(engine, _scoring_coordinator(offload)), _recovering(engine):
        try:
            yield engine
            drop_prefetched(engine)
        except BaseException:
            del offload.sdft_scoring_coordinator  # its trace is incomplete; a new one is recorded
            raise


def drop_prefetched(engine: nn.Module) -> None:
    """Drop ZeRO-3's in-flight prefetches for a forward that will not run; these could not be gathered explicitly."""
    if engines.stage(engine) == 3:
        engines.parameter_offload(engine).param_coordinator._clean_inflight_param_registry()


def forward_is_collective(engine: nn.Module) -> bool:
    """Whether each forward gathers weights from other ranks, so that all ranks must run equally many."""
    return engines.stage(engine) == 3 and ranks.world_size() > 1


def equally_many(engine: nn.Module, batches: list[list[int]], device: torch.device) -> list[list[int]]:
    """The batches of row indices, one for each forward. Where forwards are collective, equally many on every rank: one
    with fewer repeats its last row. Called by every rank before its first forward."""
    if not forward_is_collective(engine):
        return batches
    return ranks.pad_to_equal_count(batches, batches[-1][-1:], device)


def register_external_params(module: nn.Module, params: list[Tensor]) -> None:
    """Make ZeRO-3 gather parameters of submodules for the module's own forward, which uses them directly."""
    inside = {id(param) for param in module.parameters(recurse=False)}
    for param in params:
        if hasattr(param, "ds_id") and id(param) not in inside:
            import deepspeed

            deepspeed.zero.register_external_parameter(module, param)


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
class LocalShard:
    """This rank's shard of a trainable parameter, flat: elements [offset, offset + len(weights)) of the full one.

    weights: used by the forward, on all ranks once `publish_shards` has exited. master: the fp32 values that the
    optimizer updates, where it has them: in host memory if it is offloaded; None if it updates the weights themselves.
    """

    name: str
    offset: int
    weights: Tensor
    master: Tensor | None

    @property
    def values(self) -> Tensor:
        return self.weights if self.master is None else self.master

    def write(self, values: Tensor) -> None:
        """Set the weights. Values on another device are converted on that of the weights, one shard at a time: a host
        would take longer, and all shards together would take the device's memory."""
        self.weights.copy_(values.to(self.weights.device))


def local_shards(engine: nn.Module, trainable: list[tuple[str, nn.Parameter]]) -> list[LocalShard]:
    """This rank's shards of the given parameters: views into the engine, not to be kept across steps."""
    if engines.stage(engine) == 3:
        found = [_stage3_piece(engine, name, param) for name, param in trainable]
    elif engines.stage(engine) > 0:
        found = [_fragment_piece(name, param) for name, param in trainable if param._hp_mapping is not None]
    else:
        masters = _masters_by_param(engine)
        found = [LocalShard(name, 0, param.data.view(-1), masters.get(id(param))) for name, param in trainable]
    for piece in found:
        if piece.master is not None and piece.master.data_ptr() == piece.weights.data_ptr():
            raise RuntimeError(
                f"{piece.name}: DeepSpeed trains the weights that the forward computes with, and has no master from "
                "which the student could be put back after a teacher's pass. Use teacher_model_kind='live'."
            )
    return found


def _stage3_piece(engine: nn.Module, name: str, param: nn.Parameter) -> LocalShard:
    shard, master = param.ds_tensor, None
    if hasattr(engine.optimizer, "parameter_offload"):  # an inference engine has no masters
        # Not by safe_get_local_fp32_param, which copies those of an offloaded optimizer to the device.
        master = engine.optimizer._get_fp32_opt_state_partition(param, release_swap_buffers=True)[0].detach()
    offset = shard.ds_numel * param.ds_zero_partition_rank  # rank in the sharding group, which may be smaller
    return LocalShard(name, offset, shard.data, master)


def _fragment_piece(name: str, param: nn.Parameter) -> LocalShard:
    fragment = param._hp_mapping
    return LocalShard(name, fragment.lp_fragment_address.start, fragment.lp_fragment.data, fragment.hp_fragment.data)


def _masters_by_param(engine: nn.Module) -> dict[int, Tensor]:
    """Stage 0 in half precision: unsharded fp32 masters by parameter id, stored per parameter or flat per group."""
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
def publish_shards(engine: nn.Module) -> Iterator[None]:
    """Context for writing to the weights of shards; on exit all forwards on all ranks see the new values.

    At stage 3 gathered parameters may be cached, and hpZ keeps a copy of every shard in the node; both would be stale,
    so the cache is emptied first and the copies are dropped on exit. At stages 1 and 2 each rank's partition is
    all-gathered into the full weights. Also after an exception: what was written until then is the same on every rank.
    """
    if engines.stage(engine) == 3:
        engines.parameter_offload(engine).empty_partition_cache()
    try:
        yield
    finally:
        _publish(engine)


def _publish(engine: nn.Module) -> None:
    """Make values written to the weights of shards visible to all forwards on all ranks."""
    optimizer = getattr(engine, "optimizer", None)
    if engines.stage(engine) == 3 and hasattr(optimizer, "invalidate_secondary_tensor"):
        optimizer.invalidate_secondary_tensor()
    if engines.stage(engine) in (1, 2):
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
    # ZeRO-3 gathers on its own stream, which does not wait for writes on this one.
    if torch.accelerator.is_available():
        torch.accelerator.current_stream().synchronize()
