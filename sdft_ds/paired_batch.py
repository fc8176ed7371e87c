"""One completion, two sequences: pairs the student's and the teacher's view token by token and says what counts.

Shapes: R rows, T positions, C completion positions, N loss tokens.

Sequences are padded on the right, so that causal attention never sees padding and positions count from 0. The logits
that predict completion token j of a row whose prompt has p tokens stand at position p + j - 1, in either view. Only
loss tokens are ever projected: skipped, masked and empty completions have none, but stay visible to attention.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.prompts import PromptPair


@dataclass(frozen=True)
class Completion:
    """ids: the sampled tokens, the end-of-sequence token included; truncated: none was sampled within the limit."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Rollout:
    """A completion with the prompts that it is scored under, and its row number within the generation batch.

    counted: False for a duplicate that only keeps the ranks in step; it adds nothing to a loss or a metric.
    """

    row: int
    prompts: PromptPair
    completion: Completion
    counted: bool = True

    @property
    def empty(self) -> bool:
        """The model ended at once: nothing was said that a teacher could correct."""
        return len(self.completion.ids) <= 1 and not self.completion.truncated


@dataclass(frozen=True)
class LossMask:
    """Which tokens of a completion are loss tokens."""

    skip: int = 0
    mask_truncated: bool = False

    def first_token(self, rollout: Rollout) -> int:
        """Loss tokens are those from this one to the end."""
        length = len(rollout.completion.ids)
        masked = not rollout.counted or rollout.empty or (self.mask_truncated and rollout.completion.truncated)
        return length if masked else min(self.skip, length)


@dataclass(frozen=True)
class View:
    """Prompt + completion of R rows as one side sees them; positions of the loss tokens in row-major order."""

    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    positions_N: Tensor  # flat: row x T + position

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids_RT, "attention_mask": self.attention_mask_RT}


@dataclass(frozen=True)
class PairedBatch:
    """R rollouts in both views. tokens_N and rows_N give each loss token's id and its row of this batch."""

    student: View
    teacher: View
    tokens_N: Tensor
    rows_N: Tensor
    rollouts: list[Rollout]


def pair(rollouts: list[Rollout], loss_mask: LossMask, pad_token_id: int, device: torch.device) -> PairedBatch:
    """Both views of the rollouts, padded on the right."""
    first = [loss_mask.first_token(rollout) for rollout in rollouts]
    tokens = [
        token for rollout, start in zip(rollouts, first, strict=True) for token in rollout.completion.ids[start:]
    ]
    counts = [len(rollout.completion.ids) - start for rollout, start in zip(rollouts, first, strict=True)]
    return PairedBatch(
        student=view([r.prompts.student.ids for r in rollouts], rollouts, first, pad_token_id, device),
        teacher=view([r.prompts.teacher.ids for r in rollouts], rollouts, first, pad_token_id, device),
        tokens_N=torch.tensor(tokens, dtype=torch.long, device=device),
        rows_N=torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(counts)).to(device),
        rollouts=rollouts,
    )


def view(
    prompts: list[list[int]], rollouts: list[Rollout], first: list[int], pad_token_id: int, device: torch.device
) -> View:
    """The view under the given prompts; `first` is each row's first loss token."""
    rows = [prompt + rollout.completion.ids for prompt, rollout in zip(prompts, rollouts, strict=True)]
    width = max(map(len, rows))
    input_ids_RT = torch.full((len(rows), width), pad_token_id)
    attention_mask_RT = torch.zeros(len(rows), width, dtype=torch.long)
    positions = []
    for r, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids_RT[r, : len(row)] = torch.tensor(row)
        attention_mask_RT[r, : len(row)] = 1
        positions.extend(range(r * width + len(prompt) + first[r] - 1, r * width + len(row) - 1))
    return View(
        input_ids_RT.to(device),
        attention_mask_RT.to(device),
        torch.tensor(positions, dtype=torch.long, device=device),
    )


def pad_left(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both [R, longest]; what `generate` wants."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: list[list[int]], pad_token_id: int, device: torch.device) -> Tensor:
    """[R, longest]."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
