"""DeepSpeed engines: lifetime, optimizer step, universal checkpoints. Patches an engine's `step` and `destroy`.

An *engine* is whatever wraps the model for training: a DeepSpeedEngine, DDP, or the model itself. Functions here are
no-ops for engines that are not DeepSpeed's.
"""

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Checkpoint files that contain the name of the folder with the ranks' shards, or with their universal form.
LATEST, UNIVERSAL = "latest", "latest_universal"

# model -> its DeepSpeed engine; weak, because an engine that was collected has removed its hooks.
_ENGINES: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def hold(model: nn.Module, engine: nn.Module) -> None:
    """Register the engine, if it is DeepSpeed's, as the one that has its hooks on this model."""
    if hasattr(engine, "zero_optimization_stage") and not was_released(engine):
        _ENGINES[model] = weakref.ref(engine)


def release(model: nn.Module) -> None:
    """Destroy the DeepSpeed engine registered for this model and remove its hooks, so that another can be created."""
    engine = _ENGINES.pop(model, lambda: None)()
    if engine is None:
        return
    if stage(engine) == 3:
        parameter_offload(engine).empty_partition_cache()
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    # The engine calls destroy again when it is collected, which would undo what the next one sets on the parameters.
    engine.destroy = lambda: None
    engine.sdft_released = True


def was_released(engine: nn.Module) -> bool:
    return hasattr(engine, "sdft_released")


def stage(engine: nn.Module) -> int:
    """The ZeRO stage of the engine; 0 without DeepSpeed."""
    return engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0


def is_replicated(engine: nn.Module) -> bool:
    """Whether every rank holds all weights and the full optimizer state."""
    return stage(engine) == 0


def model_in(engine: nn.Module) -> nn.Module:
    """The model that the engine wraps."""
    wraps = isinstance(engine, nn.parallel.DistributedDataParallel) or hasattr(engine, "zero_optimization_stage")
    return engine.module if wraps else engine


@contextmanager
def gathered_on_save(engine: nn.Module) -> Iterator[None]:
    """Inside, saving the model gathers the full weights, even if ZeRO-3's configuration disables it."""
    if stage(engine) < 3:
        yield
        return
    config = engine._config.zero_config
    configured, config.gather_16bit_weights_on_model_save = config.gather_16bit_weights_on_model_save, True
    try:
        yield
    finally:
        config.gather_16bit_weights_on_model_save = configured


def engine_precision(accelerator: Any, model: nn.Module) -> AbstractContextManager[None]:
    """Without an engine, which would hold the weights in half precision: autocast, if they are in fp32."""
    dtype, param = accelerator.state.deepspeed_plugin.hf_ds_config.dtype(), next(model.parameters())
    if dtype == torch.float32 or param.dtype != torch.float32:
        return nullcontext()
    return torch.autocast(param.device.type, dtype)


def read_universal(engine: nn.Module, universal: bool) -> None:
    """Set whether the existing engine loads its next checkpoint in the universal form, or as saved."""
    engine._config.load_universal_checkpoint = universal


def fix_universal_checkpoint(engine: nn.Module, folder: str) -> None:
    """Work around a DeepSpeed bug: after loading a universal checkpoint, ZeRO-3 shares one step counter across
    parameters and applies group 0's hyperparameters to all groups. folder: the checkpoint."""
    if stage(engine) < 3 or not engine.load_universal_checkpoint():
        return
    optimizer = engine.optimizer.optimizer
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    shards = Path(folder, Path(folder, UNIVERSAL).read_text().strip())
    # DeepSpeed's own file, a pickle like its others.
    saved = torch.load(shards / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    for group, values in zip(optimizer.param_groups, saved["optimizer_state_dict"]["param_groups"], strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})


def set_learning_rate(scheduler: Any) -> None:
    """Make a DeepSpeed scheduler set the learning rate of its current step; a no-op for other schedulers."""
    if hasattr(scheduler, "last_batch_iteration"):
        scheduler.step(scheduler.last_batch_iteration)


def wrap_optimizer_step(engine: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Run every optimizer step inside a context. DeepSpeed only, where the step is part of backward; with other
    engines the caller does it."""
    if not hasattr(engine, "zero_optimization_stage"):
        return
    plain = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        with context():
            return plain(*args, **kwargs)

    engine.step = step


def skip_nonfinite_steps(engine: nn.Module) -> None:
    """Make the engine skip optimizer steps with non-finite gradients. DeepSpeed does so itself, except at stage 0 in
    fp32."""
    if not hasattr(engine, "zero_optimization_stage"):
        return
    if stage(engine) == 0 and not (engine.bfloat16_enabled() or engine.fp16_enabled()):
        wrap_optimizer_step(engine, lambda: _skipping_if_nonfinite(engine))


@contextmanager
def _skipping_if_nonfinite(engine: nn.Module) -> Iterator[None]:
    """Inside, the engine's optimizer skips its step if the gradient is not finite, and sets `overflow`."""
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
    """Whether DeepSpeed skipped the last optimizer step because of a non-finite gradient."""
    return bool(getattr(getattr(engine, "optimizer", None), "overflow", False))


def drop_gradients(engine: nn.Module) -> None:
    """Clear all gradients, so that a following optimizer step changes nothing, including momentum and weight decay."""
    for param in engine.parameters():
        param.grad = None


def as_loss(loss: Tensor) -> Tensor:
    """A new tensor with the loss, to pass to the engine's backward: at ZeRO stage 0 DeepSpeed divides the gradient by
    the accumulation steps a second time if backward gets the very tensor that forward returned."""
    return loss * 1.0


def convert_to_universal(shards: Path, universal: Path) -> None:
    """Convert a folder of DeepSpeed shards to a universal checkpoint. Raises CalledProcessError."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(shards), "--output_folder", str(universal)]
    subprocess.run(command, check=True)


def parameter_offload(engine: nn.Module) -> Any:
    """The object that holds ZeRO-3's coordinator: part of the optimizer, or in its place in an inference engine."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)
