"""An evaluation of more rows than fit into memory at once: they are generated in several calls, with the same result.

On a GPU everything but a few GB is taken by a tensor that does nothing; on a CPU the budget of a call is lowered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import call
from benchmarks.gpu.setup import Setup
from sdft_ds.rollouts import sampler
from tests.helpers.trainers import make_trainer


@contextmanager
def _little(left: int) -> Iterator[None]:
    """Inside, about `left` bytes are free for rollouts."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        ballast = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
        yield
        del ballast
        return
    kept, sampler.CPU_BYTES = sampler.CPU_BYTES, left
    try:
        yield
    finally:
        sampler.CPU_BYTES = kept


def evaluations(shape: str, rows: int, tokens: int, left: int) -> Iterator[dict[str, Any]]:
    """Losses of an evaluation with all memory and with little, and how many calls of `generate` each made."""
    model = models.make(shape)
    trainer = make_trainer(
        None, model=model, rows=models.rows(rows, 80, 40), num_generations=1, num_generations_eval=1,
        max_completion_length=tokens, generation_kwargs={"min_new_tokens": tokens}, per_device_eval_batch_size=8,
    )  # fmt: skip
    calls, plain = [0], model.generate

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain(*args, **kwargs)

    model.generate = counted
    for name, room in (("plenty", None), ("little", left)):
        calls[0] = 0
        if room is None:
            loss = trainer.evaluate()["eval_loss"]
        else:
            with _little(room):
                loss = trainer.evaluate()["eval_loss"]
        yield {name: {"loss": loss, "calls": calls[0]}}


def run(setup: Setup, findings: Findings) -> None:
    arguments = setup.sized(("cached", 600, 96, 6 << 30), ("tiny", 12, 8, 400_000))
    found = {name: each for made in call(evaluations, *arguments, setup=setup) for name, each in made.items()}
    findings.figure("evaluations", found)
    plenty, little = found["plenty"], found["little"]
    findings.check("with little memory in several calls", little["calls"] > plenty["calls"],
                   f"{plenty['calls']} and {little['calls']} calls")  # fmt: skip
    off = abs(little["loss"] / plenty["loss"] - 1)
    findings.check("the same loss", off <= 0.02, [plenty["loss"], little["loss"]])
    findings.say(f"{arguments[1]} rows in {little['calls']} calls")
