"""Module modes, changed temporarily and restored: train/eval, dropout, activation checkpointing, requires_grad."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Module attributes set for training; dropout is a module's `p`, or the rate that attention passes to its kernel.
SETTINGS = (
    "training", "p", "attention_dropout", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hooks", "_require_grads_hook",
)  # fmt: skip


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; restores every submodule's own mode, also after an exception."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@contextmanager
def settings_kept(module: nn.Module) -> Iterator[None]:
    """Restores SETTINGS of every submodule on exit, also after an exception; removes hooks added meanwhile."""
    before = [
        (submodule, {name: vars(submodule)[name] for name in SETTINGS if name in vars(submodule)})
        for submodule in module.modules()
    ]
    try:
        yield
    finally:
        for submodule, values in before:
            for hook in vars(submodule).get("_require_grads_hooks", []):  # activation checkpointing's
                if hook not in values.get("_require_grads_hooks", []):
                    hook.remove()
            for name in SETTINGS:
                if name not in values:
                    vars(submodule).pop(name, None)
            vars(submodule).update(values)


@contextmanager
def requires_grad_kept(module: nn.Module) -> Iterator[None]:
    """Restores requires_grad of every parameter on exit, also after an exception."""
    before = [(param, param.requires_grad) for param in module.parameters()]
    try:
        yield
    finally:
        for param, requires_grad in before:
            param.requires_grad_(requires_grad)
