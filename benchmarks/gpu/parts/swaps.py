"""A teacher's pass: the student is bit by bit what it was, the teacher what a literal second model on this CPU is."""

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from benchmarks.gpu import models, timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import arriving, each_of
from benchmarks.gpu.setup import Setup
from sdft_ds.distributed import zero
from tests.helpers.trainers import DS_CONFIGS, PROBE, digest, make_trainer, teacher_logits

# (DeepSpeed's configuration or None, adapter, bf16)
CASES = [
    (None, False, False), ("zero0", False, True), ("zero1", False, True), ("zero2", False, True),
    ("zero2", "on the head", True), ("zero3", False, True), ("zero3", True, False), ("zero2_offload", False, True),
    ("zero3_offload_optimizer", False, True), ("zero3_offload", False, True),
]  # fmt: skip
TINY = [("zero2", False, True), ("zero3", True, False)]
EMA = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3, "max_steps": 2}


def passes(cases: list[list], shape: str, swaps: int) -> Iterator[dict[str, Any]]:
    return each_of(cases, lambda *case: of_case(*case, shape=shape, swaps=swaps))


def of_case(config: str | None, lora: bool | str, bf16: bool, shape: str, swaps: int) -> dict[str, Any]:
    given = {} if config is None else {"deepspeed": str(DS_CONFIGS / f"{config}.json")}
    trainer = make_trainer(None, lora=lora, model=models.make(shape), bf16=bf16, **EMA, **given)
    trainer.train()
    engine, teacher = trainer.model_wrapped, trainer.teacher

    def everything() -> str:
        masters = [piece.values for piece in zero.local_shards(engine, teacher.trainable)]
        return digest(zero.full_copies(list(trainer.model.parameters()))) + digest(masters)

    before = everything()
    ours = teacher_logits(trainer)
    same = everything() == before
    with teacher.weights(engine):
        differs = everything() != before
    largest = max(zero.full_shape(param).numel() for _, param in teacher.trainable)
    memory = {} if trainer.args.device.type == "cpu" else _memory(trainer, swaps)
    seconds = timing.seconds(lambda: [_swap(trainer) for _ in range(3)]) / 3
    second = _second_model(trainer, shape, lora)
    off = ((second - ours).norm() / ours.norm()).item()
    return {"same": same and everything() == before, "differs": differs, "off": off, "s": seconds,
            "largest": 4 * largest, **memory}  # fmt: skip


def _swap(trainer: Any) -> None:
    with trainer.teacher.weights(trainer.model_wrapped):
        pass


def _memory(trainer: Any, swaps: int) -> dict[str, int]:
    """Bytes that a swap takes above what is held, and by which many of them grow that."""
    _swap(trainer)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _swap(trainer)
    spike = torch.cuda.max_memory_allocated() - before
    for _ in range(swaps):
        _swap(trainer)
    torch.cuda.synchronize()
    return {"spike": spike, "grown": torch.cuda.memory_allocated() - before}


def _second_model(trainer: Any, shape: str, lora: bool | str) -> torch.Tensor:
    """Logits of the saved teacher, loaded as a model of its own on this CPU, in fp32."""
    folder = tempfile.mkdtemp() if trainer.args.process_index == 0 else ""
    folder = zero.ranks.all_gather_objects(folder)[0]
    trainer.save_teacher(folder)
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # or the loaded model is sharded as well
    base = models.make(shape)
    loaded = PeftModel.from_pretrained(base, folder) if lora else type(base).from_pretrained(folder)
    with torch.no_grad():
        return loaded.float().eval()(PROBE).logits


def run(setup: Setup, findings: Findings) -> None:
    figures = {}
    arguments = setup.sized(CASES, TINY), setup.sized("small", "tiny"), 50
    for each in arriving(findings, passes, *arguments, setup=setup, ranks=setup.ranks):
        config, lora, bf16 = each.pop("case")
        tuning = "LoRA" if lora is True else f"LoRA {lora}" if lora else "full"
        name = f"{config or 'without DeepSpeed'}, {tuning}, {'bf16' if bf16 else 'fp32'}"
        _judge(findings, name, each, within=0.03 if bf16 else 1e-3)
        in_mb = {f"MB, {what}": each[what] / 1e6 for what in ("spike", "grown", "largest") if what in each}
        figures[name] = {"s/swap": each.get("s", ""), **in_mb}
    findings.figure("a swap: its time, and what it takes beside the largest parameter in fp32", figures)
    findings.say(f"{len(figures)} setups")
    if not setup.on_gpu:
        findings.skip("memory of a swap", "needs CUDA's allocator")


def _judge(findings: Findings, name: str, found: dict[str, Any], within: float) -> None:
    if "error" in found:
        findings.check(name, False, found["error"])
        return
    findings.check(f"{name}: student unchanged, bit by bit", found["same"] and found["differs"])
    findings.check(f"{name}: teacher is a literal second model", found["off"] < within, found["off"])
    if "spike" in found:
        room = 1.05 * found["largest"] + 2**20
        findings.check(f"{name}: a swap takes no more than the largest parameter", found["spike"] <= room,
                       [found["spike"], found["largest"]])  # fmt: skip
        findings.check(f"{name}: 50 swaps leave nothing", found["grown"] == 0, found["grown"])
