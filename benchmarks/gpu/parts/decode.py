"""Every way to generate in the training process, and under ZeRO-3: what a token costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu import models, timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.per_token import ours, per_token, prompts_of, way
from benchmarks.gpu.processes import arriving
from benchmarks.gpu.setup import Setup
from sdft_ds.distributed import launch
from sdft_ds.rollouts.local import LocalRollouts
from tests.helpers.trainers import make_trainer

# (way, rows, whether the prompts differ in length)
CELLS = [
    ("sdft_ds", 1, False), ("sdft_ds", 16, False), ("sdft_ds", 16, True), ("sdft_ds", 64, False),
    ("sdft_ds", 256, False), ("transformers", 16, False), ("transformers", 16, True), ("transformers", 64, False),
    ("continuous", 16, True), ("continuous", 64, False),
]  # fmt: skip
TINY = [("sdft_ds", 2, False), ("sdft_ds", 2, True), ("transformers", 2, True), ("continuous", 2, True)]


def plain(device: str, shape: str, cells: list[list], length: int, tokens: list[int], out: str) -> Iterator[dict]:
    """Each cell on a model without an engine; first the floor: all weights read once."""
    launch.avoid_cudnn_attention()
    model = models.make(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    weights = [param.data for param in model.parameters()]
    floor = timing.median_seconds(lambda: [weight.view(torch.int16).amax() for weight in weights])
    yield {"way": "all weights read once", "ms/token": 1e3 * floor}
    for name, rows, padded in cells:
        trace = f"{out}/decode_trace.json.gz" if (name, rows, padded) == ("sdft_ds", 16, False) else None
        figures = per_token(way(name, model), prompts_of(rows, length, padded), tuple(tokens), trace)
        if name == "continuous" and device == "cpu":
            del figures["host waits/token"]  # it decodes in a thread, where they are not counted
        yield {"way": f"{name}, {rows} rows{', padded' if padded else ''}", **figures}


class _Measured(Exception):
    """Ends a run before its first step."""


@contextmanager
def _at_start(trainer: Any, do: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs `do` when the trainer's engine stands; what it returns is in the list."""
    found: list[Any] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            found.append(do())
            raise _Measured

    trainer.add_callback(Begin())
    try:
        trainer.train()
    except _Measured:
        yield found


def gathered(device: str, shape: str, rows: int, length: int, tokens: list[int]) -> Iterator[dict[str, Any]]:
    """A model without an engine, and then the same under ZeRO-3, whose weights are gathered for the rollout."""
    bf16 = device == "cuda"
    launch.avoid_cudnn_attention()
    model = models.make(shape, device, torch.bfloat16 if bf16 else torch.float32)
    prompts, tokens = prompts_of(rows, length, padded=True), tuple(tokens)

    def measured(rollouts: LocalRollouts) -> dict[str, Any]:
        def whole(prompts: list[list[int]], count: int) -> list[list[int]]:
            return ours(rollouts, prompts, count, min_new_tokens=count)

        figures = per_token(whole, prompts, tokens)
        return {**figures, "greedy": ours(rollouts, prompts, tokens[0], do_sample=False)}

    trainer = make_trainer(3, model=model, bf16=bf16, max_completion_length=tokens[1])
    sampling = trainer.rollouts.sampling
    yield {"way": f"{shape} without an engine", **measured(LocalRollouts(sampling, model.to(device), lambda: model))}
    with _at_start(trainer, lambda: measured(trainer.rollouts)) as found:
        yield {"way": f"{shape} under ZeRO-3, gathered", **found[0]}


def run(setup: Setup, findings: Findings) -> None:
    lengths = setup.sized(512, 24), setup.sized([16, 96], [4, 12])
    table: dict[str, dict[str, Any]] = {}
    of_plain = setup.sized("7b", "tiny"), setup.sized(CELLS, TINY), *lengths, setup.out
    of_gathered = setup.sized("1.5b", "tiny"), setup.sized(16, 2), *lengths
    for made in (
        arriving(findings, plain, setup.device, *of_plain, setup=setup),
        arriving(findings, gathered, setup.device, *of_gathered, setup=setup, ranks=setup.ranks),
    ):
        for each in made:
            table[each.pop("way")] = each
            shown = {way: {k: v for k, v in row.items() if k != "greedy"} for way, row in table.items()}
            findings.figure("per token", shown)
    _judge(setup, findings, table)


def _judge(setup: Setup, findings: Findings, table: dict[str, dict[str, Any]]) -> None:
    whole, alone = ([row for way, row in table.items() if end in way] for end in ("gathered", "without an engine"))
    if whole and alone:
        findings.check("under ZeRO-3 the same tokens as without it", whole[0]["greedy"] == alone[0]["greedy"])
        ratio = whole[0]["ms/token"] / alone[0]["ms/token"]
        if setup.on_gpu:
            findings.check("gathered under ZeRO-3 at most 1.1 times the time", ratio <= 1.1, ratio)
        findings.say(f"{len(table)} ways; gathered under ZeRO-3 {ratio:.2f} times the plain model's time")
    for name, row in table.items():
        if setup.on_gpu and name.startswith("sdft_ds"):
            waits = row["host waits/token"]
            findings.check(f"{name}: at most one host wait per token", waits <= 1, waits)
    if not setup.on_gpu:
        findings.skip("kernels and GPU time per token", "need CUDA's profiler")
