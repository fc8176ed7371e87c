"""Cells of benchmarks.matrix on the device: the losses must be those of this CPU in one process without DeepSpeed."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import arriving, call, each_of, start
from benchmarks.gpu.setup import Setup
from benchmarks.matrix import ADAPTERS, KINDS, STAGES, cell, is_right, pairwise, save_tiny
from sdft_ds.doctor.checks import BUILD

WITHIN = 1e-3  # share by which a loss in fp32 may differ from the CPU's, whose kernels add in another order
TINY = [
    ("zero2", "full", "ema", False, False), ("zero3", "LoRA", "ema", True, False),
    ("none", "QLoRA", "live", False, False), ("zero3", "full", "base", False, True),
]  # fmt: skip


def losses(cells: list[list], folder: str) -> Iterator[dict[str, Any]]:
    """Of each cell."""
    import torch

    def made(*chosen: Any) -> dict[str, Any]:
        torch.set_float32_matmul_precision("highest")  # whatever the cell before has set
        return {"losses": cell(*chosen, folder)}

    return each_of(cells, made)


def reference_of(chosen: tuple) -> tuple:
    _, adapter, kind, _, bf16 = chosen
    return ("none", adapter, kind, False, bf16)


def run(setup: Setup, findings: Findings) -> None:
    cells = setup.sized(pairwise([STAGES, ADAPTERS, KINDS, [False, True], [False, True]]), TINY)
    if find_spec("bitsandbytes") is None:
        findings.skip("QLoRA", "needs bitsandbytes, with its kernels for this CUDA")
        cells = [chosen for chosen in cells if chosen[1] != "QLoRA"]
    cells.sort(key=lambda chosen: "offload" in chosen[0])  # last: their operator is built meanwhile
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        save_tiny(folder)
        if not setup.tiny:
            start(["-c", BUILD], setup, Path(folder, "build"))
        wanted = list(dict.fromkeys(map(reference_of, cells)))
        references = pool.submit(call, losses, wanted, folder, setup=setup, on_cpu=True)
        found = []
        for each in arriving(findings, losses, cells, folder, setup=setup, ranks=setup.ranks):
            found.append(each)
            # As it came, in case that the part does not get as far as the comparison.
            findings.figure("losses", {_name(each["case"]): each.get("losses", "none") for each in found})
        known = {tuple(each["case"]): each.get("losses") for each in references.result()}
    for each in found:
        made, reference = each.get("losses"), known[reference_of(each["case"])]
        right = bool(made and reference) and is_right(made, reference, each["case"][-1], WITHIN)
        findings.check(_name(each["case"]), right, each.get("error", {"losses": made, "CPU": reference}))
    findings.check("every cell has come", len(found) == len(cells) * setup.ranks, f"{len(found)} of {len(cells)}")
    findings.say(f"{len(cells)} cells beside the CPU's")


def _name(chosen: list) -> str:
    stage, adapter, kind, checkpointing, bf16 = chosen
    return f"{stage}, {adapter}, {kind}, {'checkpointing, ' if checkpointing else ''}{'bf16' if bf16 else 'fp32'}"
