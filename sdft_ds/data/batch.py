"""Micro-batches: rollouts, loss mask, bucketing by length, packing and collation.

Shapes: R rows, L lines, T positions, C completion positions, N loss tokens.

Sequences are right-padded, so causal attention never sees padding and positions count from 0: no attention mask is
needed. Short rows may share a line of the batch (packing), separated by position ids that restart at 0. The logits
that predict completion token j of a row with p prompt tokens are at position p + j - 1 of the row, for student and
teacher alike. Only loss tokens are projected to logits: skipped, masked and empty completions have none, but remain
visible to attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdft_ds.data.prompts import PromptPair


@dataclass(frozen=True)
class Completion:
    """ids: the sampled tokens, including EOS; truncated: no EOS was sampled within the length limit.

    log_probs: the sampler's log-probability of each token at the loss temperature, before top-p and the like; None if
    unknown.
    """

    ids: list[int]
    truncated: bool
    log_probs: list[float] | None = field(default=None, compare=False)  # rounding depends on the batch


@dataclass(frozen=True)
class Rollout:
    """A completion, the prompts it is scored under, and its row number within the generation batch.

    counted: False for a duplicate that only keeps the ranks in step; excluded from losses and metrics. in_loss: False
    if it has no context to learn from. reward and advantage: of methods with rewards; None: unknown.
    """

    row: int
    prompts: PromptPair
    completion: Completion
    counted: bool = True
    in_loss: bool = True
    reward: float | None = None
    advantage: float = 0.0

    @property
    def empty(self) -> bool:
        """EOS came first: there is nothing for the teacher to correct."""
        return len(self.completion.ids) <= 1 and not self.completion.truncated


@dataclass(frozen=True)
class LossMask:
    """Which tokens of a completion are loss tokens."""

    skip: int = 0
    mask_truncated: bool = False

    def first_token(self, rollout: Rollout) -> int:
        """Index of the first loss token; all tokens from there to the end are loss tokens."""
        length = len(rollout.completion.ids)
        masked = (
            not rollout.counted
            or not rollout.in_loss
            or rollout.empty
            or (self.mask_truncated and rollout.completion.truncated)
        )
        return length if masked else min(self.skip, length)

    def count(self, rollout: Rollout) -> int:
        return len(rollout.completion.ids) - self.first_token(rollout)


Bins = list[list[int]]  # for each line of a batch, the indices of its rows


def one_row_per_bin(lengths: list[int]) -> Bins:
    return [[row] for row in range(len(lengths))]


@dataclass(frozen=True)
class PackedInputs:
    """Prompt + completion of R rows, for student or teacher, packed into L lines; loss token positions row by row.

    position_ids_LT: each token's position in its own row; None unless rows share lines.
    """

    input_ids_LT: Tensor
    positions_N: Tensor  # flat: line x T + position
    position_ids_LT: Tensor | None = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        packed = {} if self.position_ids_LT is None else {"position_ids": self.position_ids_LT}
        return {"input_ids": self.input_ids_LT, **packed}


def pack_rows(
    rows: list[list[int]], counts: list[int], lines: Bins, pad_token_id: int, device: torch.device
) -> PackedInputs:
    """Pack rows into lines, padded to the longest line; the last counts[r] tokens of row r are loss tokens."""
    tokens = [[token for r in line for token in rows[r]] for line in lines]
    input_ids_LT = pad_right(tokens, pad_token_id, device)
    width = input_ids_LT.shape[1]
    positions: list[range] = [range(0)] * len(rows)
    for number, line in enumerate(lines):
        end = number * width
        for r in line:
            end += len(rows[r])
            positions[r] = range(end - 1 - counts[r], end - 1)
    position_ids_LT = None
    if any(len(line) > 1 for line in lines):
        # Padding counts as a row of its own: its positions restart as well.
        own = [[i for r in line for i in range(len(rows[r]))] for line in lines]
        position_ids_LT = torch.tensor([line + list(range(width - len(line))) for line in own], device=device)
    flat = [position for row in positions for position in row]
    return PackedInputs(input_ids_LT, torch.tensor(flat, dtype=torch.long, device=device), position_ids_LT)


@dataclass(frozen=True)
class MicroBatch:
    """R rollouts with the student's prompts. tokens_N, rows_N and offsets_N: each loss token's id, its row in this
    batch, and its 0-based index in the completion.

    padding: number of padding positions. anchor_N: whether each loss token is of an anchor; others_M: the indices of
    those that are not. Both None if there are no anchors.
    """

    student: PackedInputs
    tokens_N: Tensor
    rows_N: Tensor
    offsets_N: Tensor
    rollouts: list[Rollout]
    padding: int
    anchor_N: Tensor | None = None
    others_M: Tensor | None = None


def collate(
    rollouts: list[Rollout],
    loss_mask: LossMask,
    pad_token_id: int,
    device: torch.device,
    lines_of: Callable[[list[int]], Bins] = one_row_per_bin,
) -> MicroBatch:
    """Collate rollouts into a micro-batch; lines_of(row lengths) returns which rows share a line."""
    rows = [rollout.prompts.student.ids + rollout.completion.ids for rollout in rollouts]
    counts = [loss_mask.count(rollout) for rollout in rollouts]
    tokens = [token for row, count in zip(rows, counts, strict=True) for token in row[len(row) - count :]]
    lengths = [len(row) for row in rows]
    ends = [len(rollout.completion.ids) for rollout in rollouts]
    offsets = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
    student = pack_rows(rows, counts, lines_of(lengths), pad_token_id, device)
    rows_N = torch.repeat_interleave(torch.arange(len(rollouts)), torch.tensor(counts))
    anchor_N = torch.tensor([rollout.prompts.anchor for rollout in rollouts])[rows_N]
    has_anchors = any(rollout.prompts.anchor for rollout in rollouts)
    return MicroBatch(
        student=student,
        tokens_N=torch.tensor(tokens, dtype=torch.long, device=device),
        rows_N=rows_N.to(device),
        offsets_N=torch.tensor(offsets, dtype=torch.long, device=device),
        rollouts=rollouts,
        padding=student.input_ids_LT.numel() - sum(lengths),
        anchor_N=anchor_N.to(device) if has_anchors else None,
        others_M=(~anchor_N).nonzero().flatten().to(device) if has_anchors else None,
    )


def bucket_by_length(rollouts: list[Rollout], batch_size: int, batches_per_step: int) -> list[list[Rollout]]:
    """Micro-batches of `batch_size` rows of similar length. Rows move only within their optimizer step; with
    batches_per_step 1 the order is unchanged."""
    ordered = []
    rows_per_step = batch_size * batches_per_step
    for start in range(0, len(rollouts), rows_per_step):
        step = rollouts[start : start + rows_per_step]
        if batches_per_step > 1:
            step = sorted(step, key=lambda r: len(r.prompts.student.ids) + len(r.completion.ids), reverse=True)
        ordered += step
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def pad_left(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both [R, longest], as `generate` expects."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: list[list[int]], pad_token_id: int, device: torch.device) -> Tensor:
    """[R, longest]."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
