"""KL from the starting model on the retention set, without a second model in memory.

At the start the model completes the prompts greedily. The completions are kept with, at each token, the log-
probabilities of the top-128 tokens and of the tail (all others together). Later forwards over the same tokens give
KL(start || now) over these 129 outcomes: a lower bound of the KL over the vocabulary, because changes within the tail
are not seen. Takes about 1 KiB of host memory per token, on each rank.

Shapes: N continuation tokens of a batch, M of a row, C of a chunk, V vocabulary, D hidden, K top-k tokens, B those
and the tail.
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

from sdft_ds.data.batch import PackedInputs, one_row_per_bin, pack_rows
from sdft_ds.files import atomic_write
from sdft_ds.loss.chunked import HeadValues, LogitsTransform, chunks_of, whole_logits

LIKELIEST = 128
FILE = "evaluations/retention.safetensors"  # not beside a model, where some loaders take every safetensors file


@dataclass(frozen=True)
class ReferenceContinuation:
    """The starting model's greedy completion of one prompt and its top-k log-probabilities at each token.

    indices_MK: the top-k tokens. log_probs_MB: theirs, then that of the tail; fp32.
    """

    tokens: list[int]
    indices_MK: Tensor
    log_probs_MB: Tensor


@dataclass
class _Likeliest:
    """Requests log-probabilities [N, B] from the forward, which sets `indices_NK` to the tokens they belong to."""

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
    """Requests KL(start || now) per token from the forward, in nats, [N]."""

    positions_N: Tensor
    indices_NK: Tensor
    start_NB: Tensor

    def answer(self, hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
        found = []
        for chunk, log_probs_CV in _chunks(hidden_ND, head, finish):
            start_CB = self.start_NB[chunk]
            now_CB = _outcomes(log_probs_CV, self.indices_NK[chunk])
            # A vocabulary of 128 tokens or fewer has an empty tail, at the start and now: -inf on both sides.
            found.append((start_CB.exp() * (start_CB - now_CB)).masked_fill(start_CB.isinf(), 0.0).sum(-1))
        return torch.cat(found)


def _chunks(hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice, log-probabilities [C, V] fp32), one chunk of tokens at a time: [N, V] is never in memory."""
    for chunk in chunks_of(len(hidden_ND), head.weight_VD.shape[0], hidden_ND.device):
        yield chunk, whole_logits(hidden_ND[chunk], head, finish).log_softmax(-1)


def _outcomes(log_probs_CV: Tensor, indices_CK: Tensor) -> Tensor:
    """Log-probabilities [C, B] of the given tokens and the tail. Modifies log_probs_CV in place."""
    likeliest_CK = log_probs_CV.gather(-1, indices_CK)
    others_C1 = log_probs_CV.scatter_(-1, indices_CK, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([likeliest_CK, others_C1], dim=-1)


@torch.no_grad()
def continuations(
    forward: nn.Module, prompts: list[list[int]], tokens: list[list[int]], pad_token_id: int, device: torch.device
) -> list[ReferenceContinuation]:
    """The model's top-k log-probabilities at each token of a batch of rows. One forward."""
    view, counts = _view(prompts, tokens, pad_token_id, device)
    request = _Likeliest(view.positions_N)
    log_probs_NB = forward(**view.inputs, request=request).float()
    split = zip(tokens, request.indices_NK.split(counts), log_probs_NB.split(counts), strict=True)
    return [ReferenceContinuation(row, indices.int().cpu(), log_probs.cpu()) for row, indices, log_probs in split]


@torch.no_grad()
def divergences(
    forward: nn.Module,
    prompts: list[list[int]],
    start: list[ReferenceContinuation],
    pad_token_id: int,
    device: torch.device,
) -> list[float]:
    """KL(start || now) of each row of a batch, in nats, summed over its tokens. One forward."""
    view, counts = _view(prompts, [row.tokens for row in start], pad_token_id, device)
    request = _FromStart(
        view.positions_N,
        torch.cat([row.indices_MK for row in start]).long().to(device),
        torch.cat([row.log_probs_MB for row in start]).to(device),
    )
    return [each.sum().item() for each in forward(**view.inputs, request=request).double().split(counts)]


def _view(
    prompts: list[list[int]], tokens: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[PackedInputs, list[int]]:
    rows = [prompt + row for prompt, row in zip(prompts, tokens, strict=True)]
    counts = [len(row) for row in tokens]
    return pack_rows(rows, counts, one_row_per_bin(counts), pad_token_id, device), counts


def mean(sums: list[float], start: list[ReferenceContinuation]) -> float:
    """KL in nats per continuation token, over all rows."""
    return math.fsum(sums) / sum(len(row.tokens) for row in start)


def save(folder: str | Path, prompts: list[list[int]], start: list[ReferenceContinuation]) -> None:
    """Writes FILE atomically."""
    tensors = {
        "counts": torch.tensor([len(row.tokens) for row in start]),
        "tokens": torch.tensor([token for row in start for token in row.tokens]),
        "indices": torch.cat([row.indices_MK for row in start]),
        "log_probs": torch.cat([row.log_probs_MB for row in start]),
    }
    with atomic_write(Path(folder, FILE)) as aside:
        save_file(tensors, aside, {"prompts": _digest(prompts)})


def load(folder: str | Path, prompts: list[list[int]]) -> list[ReferenceContinuation]:
    """Reads FILE. Raises FileNotFoundError if it is missing, ValueError if it was written for other prompts."""
    path = Path(folder, FILE)
    if not path.exists():
        raise FileNotFoundError(
            f"retention_file: {path} does not exist, so the starting model is unknown: start a new run, "
            "or compare afterwards with python -m sdft_ds.evaluate MODEL --start STARTING_MODEL."
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
        ReferenceContinuation(tokens.tolist(), indices, log_probs)
        for tokens, indices, log_probs in zip(*parts, strict=True)
    ]


def _digest(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
