"""Loss normalization: per-token loss weights of an optimizer step, across ranks and gradient accumulation.

The weights are multiplied in in chunked.py.

Shapes: N loss tokens of a micro-batch. With x the loss of a token, every loss_type is scale x sum of weight x; only
the weights and the scale differ. Counts are those of the full optimizer step, over ranks and micro-batches, and are
known before its first backward: summed over micro-batches and averaged over ranks, as gradients are, the result does
not depend on how rows are distributed over them (except bnpo, which is defined per micro-batch).

    dapo      sum x / loss tokens
    grpo      mean over completions of (sum x / loss tokens of the completion); one without loss tokens counts as 0
    bnpo      mean over micro-batches of (sum x / loss tokens of the micro-batch over all ranks)
    dr_grpo   sum x / (completions x max_completion_length)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.data.batch import MicroBatch


@dataclass(frozen=True)
class LossWeights:
    """weights_N of a micro-batch's loss tokens, and the scale of the weighted sum."""

    weights_N: Tensor
    scale: Tensor


def loss_weights(
    batches: list[MicroBatch],
    loss_type: str,
    max_completion_length: int,
    world_size: int,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> list[LossWeights]:
    """Loss weights of an optimizer step's micro-batches. Called by all ranks, with equally many micro-batches."""
    device = batches[0].tokens_N.device
    tokens = [len(batch.tokens_N) for batch in batches]
    completions = sum(rollout.counted for batch in batches for rollout in batch.rollouts)
    totals = all_reduce_sum(torch.tensor([*tokens, completions], dtype=torch.float64, device=device))
    # Without any loss token the sum is empty, so any finite scale will do.
    tokens_by_batch, completions = totals[:-1].clamp(min=1.0), totals[-1].clamp(min=1.0)
    step_tokens = totals[:-1].sum().clamp(min=1.0)
    scale_of = {
        "dapo": lambda b: world_size / step_tokens,
        "grpo": lambda b: world_size / completions,
        "bnpo": lambda b: world_size / (tokens_by_batch[b] * len(batches)),
        "dr_grpo": lambda b: world_size / (completions * max_completion_length),
    }[loss_type]
    return [
        LossWeights(
            weights_N=_per_completion(batch)
            if loss_type == "grpo"
            else torch.ones(len(batch.tokens_N), device=device),
            scale=scale_of(b).float(),
        )
        for b, batch in enumerate(batches)
    ]


def _per_completion(batch: MicroBatch) -> Tensor:
    """1 / (loss tokens of the token's completion), [N]."""
    ones_N = torch.ones(len(batch.rows_N), device=batch.rows_N.device)
    counts_R = torch.zeros(len(batch.rollouts), device=ones_N.device).index_add_(0, batch.rows_N, ones_N)
    return 1.0 / counts_R[batch.rows_N]
