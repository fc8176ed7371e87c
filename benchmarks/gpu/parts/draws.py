"""What is sampled: the device's choices from the same scores, and whole rollouts, beside this CPU's."""

import copy
from itertools import zip_longest

import torch
from transformers import TopPLogitsWarper

from benchmarks.gpu import models, timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Setup
from sdft_ds.rollouts.draws import Draws
from sdft_ds.rollouts.engine import Sampling
from sdft_ds.rollouts.local import LocalRollouts


def chosen(scores_RV: torch.Tensor, device: str, positions: int) -> torch.Tensor:
    """A token of each row at each position, [positions, R]."""
    draws = Draws([f"0/{row}" for row in range(len(scores_RV))], positions, torch.device(device))
    scores_RV, rows_R = scores_RV.to(device), torch.arange(len(scores_RV), device=device)
    return torch.stack([draws.choose(scores_RV, rows_R, position) for position in range(positions)]).cpu()


def sampled(model: torch.nn.Module, rows: int, tokens: int, batch_tokens: int | None = None) -> list[list[int]]:
    vocabulary = model.config.vocab_size
    options = {"do_sample": True, "max_new_tokens": tokens, "temperature": 1.0}
    sampling = Sampling(options, [vocabulary], 0, seed=0)
    rollouts = LocalRollouts(sampling, model, lambda: model, batch_tokens=batch_tokens)
    prompts = [[1 + (7 * i + k) % (vocabulary - 1) for k in range(3 + i % 9)] for i in range(rows)]
    return [made.ids for made in rollouts.generate(prompts, [f"row/{i}" for i in range(rows)])]


def differing(found: list[list[int]], wanted: list[list[int]]) -> float:
    pairs = [pair for rows in zip(found, wanted, strict=True) for pair in zip_longest(*rows)]
    return sum(a != b for a, b in pairs) / len(pairs)


def run(setup: Setup, findings: Findings) -> None:
    _choices(setup, findings)
    _rollouts(setup, findings)


def _choices(setup: Setup, findings: Findings) -> None:
    """Probabilities are rounded otherwise on the device, so that a number that falls between two tokens may choose the
    other one: in one of 1e5 draws or so, never in many."""
    rows, positions = setup.sized((256, 4), (8, 4))
    vocabulary = setup.sized(152064, 264)
    scores_RV = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    barred_RV = scores_RV.masked_fill(scores_RV < 0, float("-inf"))
    for name, scores in {
        "plain": scores_RV,
        "half of them barred": barred_RV,
        "top-p 0.9": TopPLogitsWarper(0.9)(None, scores_RV),
    }.items():
        share = (chosen(scores, setup.device, positions) != chosen(scores, "cpu", positions)).float().mean().item()
        findings.check(f"draws, {name}: share that differs from the CPU's", share <= 2e-3, share)
    scores = scores_RV.to(setup.device)
    milliseconds = {
        count: 1e3 * timing.median_seconds(lambda: chosen(scores[:count], setup.device, 1))  # noqa: B023
        for count in setup.sized((1, 16, 64), (1, 8))
    }
    findings.figure("ms of a choice, by rows", milliseconds)


def _rollouts(setup: Setup, findings: Findings) -> None:
    """In fp32, where other kernels and other numbers of rows round so little that tokens seldom change."""
    rows, tokens = setup.sized((64, 64), (6, 8))
    model = models.make(setup.sized("small", "tiny"))
    here = copy.deepcopy(model).to(setup.device)
    once = sampled(here, rows, tokens)
    findings.check("the same rollout twice is the same", sampled(here, rows, tokens) == once)
    share = differing(once, sampled(model, rows, tokens))
    findings.check("a rollout in fp32: share of tokens that differ from the CPU's", share <= 0.02, share)
    quarter = rows // 4 * (tokens + 12)
    share = differing(sampled(here, rows, tokens, quarter), once)
    findings.check("in four calls in place of one: share that differs", share <= 0.02, share)
    findings.say(f"{len(once)} rollouts beside the CPU's")
    if setup.on_gpu:
        half = here.bfloat16()
        share = differing(sampled(half, rows, tokens, quarter), sampled(half, rows, tokens))
        findings.figure("the same in bf16, where it may", share)
