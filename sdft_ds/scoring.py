"""The no-grad pass over a generation batch, before any forward of the student's step: the teacher's hidden states.

Shapes: N loss tokens of a micro-batch, R rows, C completion positions, D hidden. What is kept is N x D in the compute
dtype for each micro-batch, never logits; the loss projects them with the teacher's head, which is copied wherever its
values will differ from the student's by then.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdft_ds import zero
from sdft_ds.chunked_loss import HeadValues
from sdft_ds.completion_head import HiddenStates, TokenLogProbs, head_of
from sdft_ds.module_state import evaluating
from sdft_ds.paired_batch import PairedBatch, pad_right, view
from sdft_ds.teacher import Teacher


@dataclass(frozen=True)
class Scored:
    """A paired micro-batch and what the teacher, and the sampler where it is needed, think of it."""

    batch: PairedBatch
    teacher_hidden_ND: Tensor
    teacher_head: HeadValues | None  # None: the student's own at the time of the loss
    old_log_probs_N: Tensor | None = None


@dataclass(frozen=True)
class Scorer:
    """dtype: the compute dtype, in which the head multiplies. keep_on: where hidden states wait for the loss.

    temperature: that of the old log-probabilities.
    """

    engine: nn.Module
    teacher: Teacher
    dtype: torch.dtype
    keep_on: torch.device
    temperature: float

    @torch.no_grad()
    def score(self, batches: list[PairedBatch], head_changes: bool, old: list[Tensor | None]) -> list[Scored]:
        """Score every micro-batch in one swap of weights. Every rank calls it with as many micro-batches.

        head_changes: the student's head will have been trained before the last of the batches is used. old: what
        `student_log_probs` gave for each micro-batch, where that is wanted.
        """
        head = head_of(self.teacher.model)
        with zero.scoring_pass(self.engine), evaluating(self.engine), self.teacher.weights(self.engine):
            hidden = [
                self.engine(**batch.teacher.inputs, request=HiddenStates(batch.teacher.positions_N))
                .to(self.dtype)
                .to(self.keep_on)
                for batch in batches
            ]
            values = None
            if self.teacher.head_differs or (head_changes and head.weight.requires_grad):
                copies = zero.full_copies([head.weight] if head.bias is None else [head.weight, head.bias])
                values = HeadValues(*(copy.to(self.dtype) for copy in copies))
        return [
            Scored(batch, states, values, None if log_probs_RC is None else _of_loss_tokens(batch, log_probs_RC))
            for batch, states, log_probs_RC in zip(batches, hidden, old, strict=True)
        ]

    @torch.no_grad()
    def student_log_probs(self, batch: PairedBatch, pad_token_id: int) -> Tensor:
        """The student's log-probability of every completion token of a micro-batch as of now, [R, C], 0 at padding."""
        completions = [rollout.completion.ids for rollout in batch.rollouts]
        device = batch.tokens_N.device
        everything = view(
            [rollout.prompts.student.ids for rollout in batch.rollouts],
            batch.rollouts,
            [0] * len(completions),
            pad_token_id,
            device,
        )
        tokens = torch.tensor([token for ids in completions for token in ids], device=device)
        with zero.scoring_pass(self.engine), evaluating(self.engine):
            log_probs = self.engine(
                **everything.inputs, request=TokenLogProbs(everything.positions_N, tokens, self.temperature)
            )
        padded_RC = torch.zeros(pad_right(completions, pad_token_id, device).shape, device=device)
        lengths_R1 = torch.tensor([[len(ids)] for ids in completions], device=device)
        padded_RC[torch.arange(padded_RC.shape[1], device=device) < lengths_R1] = log_probs.float()
        return padded_RC


def _of_loss_tokens(batch: PairedBatch, values_RC: Tensor) -> Tensor:
    """The values at the loss tokens of the batch, which are the last ones of each row's completion, [N]."""
    counts = torch.bincount(batch.rows_N, minlength=len(batch.rollouts)).tolist()
    lengths = [len(rollout.completion.ids) for rollout in batch.rollouts]
    return torch.cat([values_RC[r, lengths[r] - count : lengths[r]] for r, count in enumerate(counts)])
