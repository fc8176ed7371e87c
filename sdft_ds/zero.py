"""The only module that knows DeepSpeed: starting it, its ZeRO stages, gathering weights, keeping its trace.

An *engine* here is whatever wraps the model for training: a DeepSpeedEngine, DDP, or the model itself.
deepspeed is imported where it is used: it is slow to import, and nobody needs it who trains without it.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn


def no_accelerator() -> bool:
    """True on a machine where only the CPU can train."""
    return not torch.accelerator.is_available()


def start_process_group(deepspeed_config: Any, use_cpu: bool, timeout_seconds: int) -> None:
    """Start DeepSpeed's process group where accelerate would not do it right; nothing without a configuration.

    On a CPU it has to exist before TrainingArguments builds accelerate's state: that starts torch's group but not
    deepspeed.comm, after which zero.Init believes that the world has one rank. Plain `python` becomes rank 0 of 1.
    """
    if not deepspeed_config:
        return
    # JIT operators are built with ninja from the environment of this interpreter, activated or not.
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
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

        deepspeed.init_distributed("gloo", verbose=False, timeout=timedelta(seconds=timeout_seconds))


def stage(engine: nn.Module) -> int:
    """The ZeRO stage of the engine; 0 without DeepSpeed."""
    return engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0


def masters_are_kept(engine: nn.Module) -> bool:
    """Whether the engine keeps fp32 masters of half-precision weights."""
    return hasattr(engine, "zero_optimization_stage") and (engine.bfloat16_enabled() or engine.fp16_enabled())


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
def generation_weights(engine: nn.Module, gather: bool) -> Iterator[dict[str, Any]]:
    """The model inside the engine can `generate` within; yields the keyword arguments that generate needs for it.

    ZeRO-3 with `gather`: all weights are gathered once and its hooks idle, so ranks may differ in the number and the
    length of their calls. Without: each layer is gathered for each token, and all ranks go on until the last is done.
    """
    if stage(engine) < 3:
        yield {}
    elif not gather:
        yield {"synced_gpus": True}
    else:
        with _gathered(list(engine.module.parameters())), _coordinator(engine, _Resident()):
            yield {}


@contextmanager
def scoring_pass(engine: nn.Module) -> Iterator[None]:
    """Forwards that no backward follows: ZeRO-3 must not mix them up with the order of a training step.

    Its coordinator learns the order of modules over one forward and backward, and prefetches by it. A second
    coordinator, with the same settings, learns the order of these forwards; the training step's stays valid.
    """
    if stage(engine) < 3:
        yield
        return
    coordinator = _scoring_coordinator(_offload(engine))
    with _coordinator(engine, coordinator):
        yield
        coordinator._clean_inflight_param_registry()  # what it prefetched for a forward that does not come


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
