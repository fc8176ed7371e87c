"""Skinny-GEMM workaround for MKL, patched into linear layers on a CPU: computes W x^T instead of x W^T for few rows.

A decode step multiplies 2 to 16 rows with every weight. In fp32 this order is faster on two cores of an AMD EPYC and
no slower on one; with one row both are the same product. Other devices and dtypes are not affected.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = range(2, 17)
# Attribute in which completion_forward keeps the original forward of a patched module, which the patch calls.
PLAIN_FORWARD = "sdft_plain_forward"


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    weight = linear.weight
    if rows not in ROWS or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, linear.bias)
    product = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous()
    return (product if linear.bias is None else product + linear.bias).view(*x.shape[:-1], -1)


@contextmanager
def skinny_gemm(model: nn.Module) -> Iterator[None]:
    """Patch the plain linear layers of a model on a CPU inside."""
    changed: list[tuple[nn.Linear, str, Any]] = []
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            name = PLAIN_FORWARD if hasattr(module, PLAIN_FORWARD) else "forward"
            if type(module) is nn.Linear and (name != "forward" or name not in vars(module)):
                changed.append((module, name, vars(module).get(name)))
    for module, name, _ in changed:
        setattr(module, name, types.MethodType(_forward, module))
    try:
        yield
    finally:
        for module, name, before in changed:
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
