"""Attention at each new shape: a decoded token is one, and so is each width of a micro-batch.

cuDNN's kernels, which torch prefers on Hopper and newer, build a plan for each; training switches them off.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from benchmarks.gpu import timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import call
from benchmarks.gpu.setup import Setup
from sdft_ds.distributed import launch

# Name -> (as training sets it, more environment).
ARMS = {
    "as trained": (True, {}),
    "torch's default": (False, {}),
    "cuDNN without new plans": (False, {"TORCH_CUDNN_SDPA_AVOID_RECOMPILE": "1"}),
}


def decoding(device: str, dtype: torch.dtype, rows: int, length: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and mask of a token: 4 KV heads of 7 queries, as transformers packs them; padded left."""
    generator = torch.Generator().manual_seed(length)
    sizes = [(rows, 4, 7, 128), (rows, 4, length, 128), (rows, 4, length, 128)]
    mask = torch.arange(length) >= torch.arange(rows)[:, None, None, None]
    return *(torch.randn(size, generator=generator).to(device, dtype) for size in sizes), mask.to(device)


def training(device: str, dtype: torch.dtype, rows: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, 28, length, 128, generator=generator).to(device, dtype).requires_grad_()
            for _ in range(3)]  # fmt: skip


def forward_and_backward(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    attend(*tensors, is_causal=True).square().sum().backward()
    return [tensor.grad for tensor in tensors]


def arm(device: str, trained: bool, rows: int, lengths: list[int], widths: list[int]) -> Iterator[dict[str, Any]]:
    """Milliseconds of the first call at each shape, and how far from this CPU in fp32."""
    if trained:
        launch.avoid_cudnn_attention()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    attend(*(each := decoding(device, dtype, rows, lengths[0]))[:3], attn_mask=each[3])  # loads the kernels
    forward_and_backward(training(device, dtype, 4, widths[0]))
    made = [decoding(device, dtype, rows, length) for length in lengths[1:]]
    milliseconds = [1e3 * timing.seconds(lambda: attend(*each[:3], attn_mask=each[3])) for each in made]  # noqa: B023
    yield {"decoding": [statistics.median(milliseconds), max(milliseconds)]}
    made = [training(device, dtype, 4, width) for width in widths[1:]]
    milliseconds = [1e3 * timing.seconds(lambda: forward_and_backward(each)) for each in made]  # noqa: B023
    yield {"training": [statistics.median(milliseconds), max(milliseconds)]}
    found, wanted = (
        [attend(*(each := decoding(where, kind, rows, lengths[0]))[:3], attn_mask=each[3]),
         *forward_and_backward(training(where, kind, 1, widths[0]))]
        for where, kind in ((device, dtype), ("cpu", torch.float32))
    )  # fmt: skip
    yield {"off": max(((a.cpu() - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))}


def run(setup: Setup, findings: Findings) -> None:
    for name, (trained, environment) in ARMS.items():
        if not trained and not setup.on_gpu:
            findings.skip(name, "cuDNN's attention needs CUDA")
            continue
        lengths = list(range(512, setup.sized(544, 516)))
        widths = list(range(300, setup.sized(309, 302)))
        arguments = (setup.device, trained, setup.sized(16, 2), lengths, widths)
        figures = {k: v for each in call(arm, *arguments, setup=setup, environment=environment)
                   for k, v in each.items()}  # fmt: skip
        for what in ("decoding", "training"):
            findings.figure(f"{name}: {what}, median and longest ms of a new shape", figures[what])
        if trained:
            findings.check("within rounding of fp32 on the CPU", figures["off"] < 2e-2, figures["off"])
            findings.say(f"decoding {figures['decoding'][0]:.3g} ms, training {figures['training'][0]:.3g} ms")
            if setup.on_gpu:
                quick = figures["decoding"][0] < 1
                findings.check("a new shape takes below 1 ms in decoding", quick, figures["decoding"])
