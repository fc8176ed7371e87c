"""A run that is interrupted inside a generation batch, and resumed.

The resumed run begins with the weights, the teacher and the draws of the checkpoint, bit by bit. What comes after is
equal within rounding on a GPU, where sums of gradients may be added in another order from run to run.
"""

import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import arriving, each_of
from benchmarks.gpu.setup import Setup
from tests.distributed.scenarios.checkpoints import resume
from tests.helpers import tiny

INSIDE = {"steps_per_generation": 2, "num_iterations": 2}  # the third step is inside a generation batch
CASES = [(2, False, False), (3, True, True), (None, False, False)]  # (ZeRO stage, LoRA, bf16)


def runs(cases: list[list], model: str, out: str) -> Iterator[dict[str, Any]]:
    def made(stage: int | None, lora: bool, bf16: bool) -> dict[str, Any]:
        folder = f"{out}/{stage}-{lora}-{bf16}"
        return resume(stage, folder, lora=lora, bf16=bf16, model=model, teacher_model_kind="ema", **INSIDE)

    return each_of(cases, made)


def run(setup: Setup, findings: Findings) -> None:
    exact = []
    with tempfile.TemporaryDirectory() as folder:
        models.make(setup.sized("small", "tiny")).save_pretrained(f"{folder}/model")
        tiny.tokenizer().save_pretrained(f"{folder}/model")
        cases = setup.sized(CASES, CASES[:1])
        for each in arriving(findings, runs, cases, f"{folder}/model", folder, setup=setup, ranks=setup.ranks):
            exact.append(_judge(findings, each))
    findings.say(f"{sum(exact)} of {len(exact)} to the last bit")


def _judge(findings: Findings, found: dict[str, Any]) -> bool:
    """Whether the resumed run ended as the whole one, bit by bit."""
    stage, lora, bf16 = found["case"]
    name = f"stage {stage}, {'LoRA' if lora else 'full'}, {'bf16' if bf16 else 'fp32'}"
    if "error" in found:
        findings.check(name, False, found["error"])
        return False
    whole, first, resumed = found["whole"], found["first"], found["resumed"]
    for what in ("weights", "teacher"):
        findings.check(f"{name}: begins with the {what} of the checkpoint", resumed["start"][what] == first[what])
    off = max(abs(a / b - 1) for a, b in zip(resumed["losses"], whole["losses"][3:], strict=True))
    findings.check(f"{name}: losses after it within {5 if bf16 else 0.1} %", off <= (0.05 if bf16 else 1e-3), off)
    same = all(resumed[what] == whole[what] for what in ("weights", "teacher"))
    findings.figure(f"{name}: to the last bit", same and resumed["losses"] == whole["losses"][3:])
    return same
