"""Whole optimizer steps of a 1.5B model by the paper's recipe: seconds of each phase, and memory beside the plan's."""

import gc
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import arriving, each_of
from benchmarks.gpu.setup import Setup
from benchmarks.step_time import Clock
from sdft_ds.config.recipes import RECIPES
from sdft_ds.plan.footprint import footprint
from sdft_ds.plan.job import ZERO_2, ZERO_3, Job
from sdft_ds.plan.model_shape import shape_of
from tests.helpers.trainers import make_trainer

SETUPS = {"zero2": ZERO_2, "zero3": ZERO_3}
CASES = [("zero2", False), ("zero3", False), ("zero2", True)]  # (DeepSpeed's configuration, LoRA)
LENGTHS = {"prompt": 256, "teacher_prompt": 640, "completion": 128}  # tokens
TINY = {"prompt": 96, "teacher_prompt": 384, "completion": 8}
CHAT, TEMPLATE = 60, 180  # tokens around a question, and around the context in the teacher's prompt


class Memory(TrainerCallback):
    """Bytes on the device: the peak after the first step, and what the allocator then keeps free."""

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available() and state.global_step == 1:
            torch.cuda.reset_peak_memory_stats()
        elif torch.cuda.is_available():
            self.peak, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def runs(cases: list[list], shape: str, rows: int, lengths: dict[str, int], steps: int) -> Iterator[dict[str, Any]]:
    return each_of(cases, lambda *case: of_case(*case, name=shape, rows=rows, lengths=lengths, steps=steps))


def of_case(config: str, lora: bool, name: str, rows: int, lengths: dict[str, int], steps: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gc.collect()  # what the case before has left
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    bf16, longest = device == "cuda", lengths["completion"]
    model = models.make(name, device, torch.bfloat16 if bf16 else torch.float32)
    shape, question = shape_of(model), lengths["prompt"] - CHAT
    context = lengths["teacher_prompt"] - question - TEMPLATE
    clock, memory = Clock(), Memory()
    trainer = make_trainer(
        int(config[-1]), lora=lora, model=model, callbacks=[clock, memory], bf16=bf16, max_steps=steps,
        rows=models.rows(rows * (steps + 1), question, context),
        **{**RECIPES["paper"], "max_prompt_length": lengths["prompt"], "max_completion_length": longest},
        max_teacher_prompt_length=lengths["teacher_prompt"], per_device_train_batch_size=rows,
        activation_checkpointing=True, generation_kwargs={"min_new_tokens": longest},
    )  # fmt: skip
    trainer.train()
    phases = {name[8:]: value for name, value in clock.logs[-1].items() if name.startswith("seconds/")}
    found = {"s/step": clock.seconds[-1], **{f"{name}, s": value for name, value in phases.items()}}
    if device == "cuda":
        # 6 operations per parameter and token, 2 more where activations are computed again, 2 in the teacher's pass.
        student = 8 * shape.parameters * rows * (lengths["prompt"] + longest) / phases["student"]
        teacher = 2 * shape.parameters * rows * (lengths["teacher_prompt"] + longest) / phases["teacher"]
        found |= {"TFLOP/s, student": student / 1e12, "TFLOP/s, teacher": teacher / 1e12}
        found |= {"peak": memory.peak - before, "reserved": memory.reserved}
    adapted = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad) if lora else 0
    job = Job(
        shape, trainer.args.world_size, tuning="lora" if lora else "full", adapter=adapted, teacher="ema",
        bf16=bf16, batch=rows, generations=1, topk=None, **lengths,
    )  # fmt: skip
    plan = footprint(job, SETUPS[config]).peak
    return {**found, "plan": plan, "losses": [log["loss"] for log in clock.logs]}


def run(setup: Setup, findings: Findings) -> None:
    shape, rows, lengths = setup.sized("1.5b", "tiny"), setup.sized(8, 2), setup.sized(LENGTHS, TINY)
    arguments = setup.sized(CASES, CASES[:1]), shape, rows, lengths, setup.sized(3, 2)
    figures: dict[str, Any] = {}
    for each in arriving(findings, runs, *arguments, setup=setup, ranks=setup.ranks):
        config, lora = each.pop("case")
        name = config + (", LoRA" if lora else "")
        if "error" in each:
            findings.check(name, False, each["error"])
            continue
        losses = each.pop("losses")
        findings.check(f"{name}: losses are finite", all(map(math.isfinite, losses)), losses)
        if setup.on_gpu:
            off = each["plan"] / each["peak"] - 1
            findings.check(
                f"{name}: peak within 10 % of the plan's", abs(off) <= 0.1, f"the plan is off by {off:+.1%}"
            )
        in_gb = {f"GB, {what}": each.pop(what) / 1e9 for what in ("plan", "peak", "reserved") if what in each}
        figures[name] = {**each, **in_gb}
        findings.figure("by setup", figures)
    findings.say(", ".join(f"{name} {row['s/step']:.3g} s/step" for name, row in figures.items()))
    if not setup.on_gpu:
        findings.skip("memory beside the plan's, TFLOP/s", "need a GPU; on a CPU see benchmarks.plan")
