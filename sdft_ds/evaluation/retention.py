"""How far a model has moved from the one it was at the start, without a second model in memory.

At the start the model continues some prompts greedily. Kept are those tokens and, for each of them, the log-
probabilities of the 128 likeliest tokens, and that of all others together. Later forwards over the same tokens give
KL(start || now) over these 129 outcomes: a lower bound of the KL over the vocabulary, for what moves among the others
is not seen. It takes about 1 KiB of host memory a token, on each rank.

Shapes: N continuation tokens of a batch, M of a row, C of a chunk, V vocabulary, D hidden, K likeliest tokens, B those
and the others.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdft_ds.chunked_loss import CHUNK_ELEMENTS, HeadValues, LogitsTransform, whole_logits
from sdft_ds.paired_batch import View, lay_out, one_line_each
from sdft_ds.whole_files import written_aside

LIKELIEST = 128
FILE = "evaluations/retention.safetensors"  # not beside a model, where some loaders take every safetensors file


@dataclass(frozen=True)
class Continuation:
    """What the starting model said after one prompt: its tokens, and what it held likely at each of them.

    indices_MK: the likeliest tokens. log_probs_MB: theirs, and last that of all others together; fp32.
    """

    tokens: list[int]
    indices_MK: Tensor
    log_probs_MB: Tensor


@dataclass
class _Likeliest:
    """Ask for log-probabilities [N, B]; `indices_NK` says afterwards of which tokens."""

    positions_N: Tensor
    indices_NK: Tensor | None = None

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        chunks = []
        for _, log_probs_CV in _chunks(hidden_ND, head, finish):
            indices_CK = log_probs_CV.topk(min(LIKELIEST, log_probs_CV.shape[1]), dim=-1).indices
            chunks.append((indices_CK, _outcomes(log_probs_CV, indices_CK)))
        indices, outcomes = zip(*chunks, strict=True)
        self.indices_NK = torch.cat(indices)
        return torch.cat(outcomes)


@dataclass
class _FromStart:
    """Ask for KL(start || now) at each token, in nats, [N]."""

    positions_N: Tensor
    indices_NK: Tensor
    start_NB: Tensor

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        found = []
        for chunk, log_probs_CV in _chunks(hidden_ND, head, finish):
            start_CB = self.start_NB[chunk]
            now_CB = _outcomes(log_probs_CV, self.indices_NK[chunk])
            # A vocabulary of 128 tokens or fewer has no others, at the start and now: -inf on both sides.
            found.append((start_CB.exp() * (start_CB - now_CB)).masked_fill(start_CB.isinf(), 0.0).sum(-1))
        return torch.cat(found)


def _chunks(hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Iterator[tuple[slice, Tensor]]:
    """(slice, log-probabilities [C, V] fp32) of a few tokens at a time: [N, V] is never in memory."""
    size = max(1, CHUNK_ELEMENTS // head.weight_VD.shape[0])
    for start in range(0, len(hidden_ND), size):
        chunk = slice(start, start + size)
        yield chunk, whole_logits(hidden_ND[chunk], head, finish).log_softmax(-1)


def _outcomes(log_probs_CV: Tensor, indices_CK: Tensor) -> Tensor:
    """[C, B]. Changes log_probs_CV."""
    likeliest_CK = log_probs_CV.gather(-1, indices_CK)
    others_C1 = log_probs_CV.scatter_(-1, indices_CK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([likeliest_CK, others_C1], dim=-1)


@torch.no_grad()
def continuations(
    forward: nn.Module, prompts: list[list[int]], tokens: list[list[int]], pad_token_id: int, device: torch.device
) -> list[Continuation]:
    """What the model holds likely at each token of one batch of rows. One forward."""
    view, counts = _view(prompts, tokens, pad_token_id, device)
    request = _Likeliest(view.positions_N)
    log_probs_NB = forward(**view.inputs, request=request).float()
    split = zip(tokens, request.indices_NK.split(counts), log_probs_NB.split(counts), strict=True)
    return [Continuation(row, indices.int().cpu(), log_probs.cpu()) for row, indices, log_probs in split]


@torch.no_grad()
def divergences(
    forward: nn.Module, prompts: list[list[int]], start: list[Continuation], pad_token_id: int, device: torch.device
) -> list[float]:
    """KL(start || now) of one batch of rows, in nats, summed over the tokens of each. One forward."""
    view, counts = _view(prompts, [row.tokens for row in start], pad_token_id, device)
    request = _FromStart(
        view.positions_N,
        torch.cat([row.indices_MK for row in start]).long().to(device),
        torch.cat([row.log_probs_MB for row in start]).to(device),
    )
    return [each.sum().item() for each in forward(**view.inputs, request=request).double().split(counts)]


def _view(
    prompts: list[list[int]], tokens: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[View, list[int]]:
    rows = [prompt + row for prompt, row in zip(prompts, tokens, strict=True)]
    counts = [len(row) for row in tokens]
    return lay_out(rows, counts, one_line_each(counts), pad_token_id, device), counts


def mean(sums: list[float], start: list[Continuation]) -> float:
    """Nats per continuation token, over all rows."""
    return math.fsum(sums) / sum(len(row.tokens) for row in start)


def save(folder: str | Path, prompts: list[list[int]], start: list[Continuation]) -> None:
    """Write FILE."""
    tensors = {
        "counts": torch.tensor([len(row.tokens) for row in start]),
        "tokens": torch.tensor([token for row in start for token in row.tokens]),
        "indices": torch.cat([row.indices_MK for row in start]),
        "log_probs": torch.cat([row.log_probs_MB for row in start]),
    }
    with written_aside(Path(folder, FILE)) as aside:
        save_file(tensors, aside, {"prompts": _digest(prompts)})


def load(folder: str | Path, prompts: list[list[int]]) -> list[Continuation]:
    """Read FILE. Raises FileNotFoundError where there is none, ValueError where it was made for other prompts."""
    path = Path(folder, FILE)
    if not path.exists():
        raise FileNotFoundError(
            f"retention_file: {path} does not exist, so nothing says what the starting model was like: start the "
            "run anew, or compare afterwards with python -m sdft_ds.evaluate MODEL --start STARTING_MODEL."
        )
    with safe_open(path, framework="pt") as file:
        if file.metadata()["prompts"] != _digest(prompts):
            raise ValueError(
                f"retention_file: {path} was made for other prompts, or another tokenizer or chat template: use "
                "those of the start of the run."
            )
        counts = file.get_tensor("counts").tolist()
        parts = [file.get_tensor(name).split(counts) for name in ("tokens", "indices", "log_probs")]
    return [
        Continuation(tokens.tolist(), indices, log_probs) for tokens, indices, log_probs in zip(*parts, strict=True)
    ]


def _digest(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
