"""Context managers that restore a model's mode, dropout, activation checkpointing and requires_grad exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# Attributes of modules that training sets; dropout is a module's `p`, or the rate that attention gives to its kernel.
SETTINGS = (
    "training", "p", "attention_dropout", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hooks", "_require_grads_hook",
)  # fmt: skip


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule's own mode as it was, also after an exception."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


@contextmanager
def settings_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards SETTINGS of every submodule are as they were, also after an exception; hooks that are new in them are
    removed."""
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
    """Afterwards the same parameters require a gradient as before, also after an exception."""
    before = [(param, param.requires_grad) for param in module.parameters()]
    try:
        yield
    finally:
        for param, requires_grad in before:
            param.requires_grad_(requires_grad)
