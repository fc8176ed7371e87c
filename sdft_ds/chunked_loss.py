"""The language-model head and the divergence, one chunk of tokens at a time: [N, V] logits are never in memory.

Shapes: N loss tokens, C tokens of a chunk, V vocabulary, D hidden.

Memory, beyond the hidden states and the head's own gradient: O(C x V). Each chunk is projected, compared, and its
gradient taken at once, so the backward pass only scales what the forward pass found. Inside, the sum of
weight x loss is kept unscaled: the scale (1 / loss tokens of the whole optimizer step) is applied in fp32 at the end,
where it cannot push a half-precision gradient below its smallest number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft_ds.divergence import Divergence, importance_weight, token_log_probs

LogitsTransform = Callable[[Tensor], Tensor]

# Elements of one chunk's logits; 16 Mi fp32 elements are 64 MB, and a loss holds about six tensors of that size.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class HeadValues:
    """The values of a language-model head at one moment: weight [V, D] and bias [V] or None."""

    weight_VD: Tensor
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """What the loss of N completion tokens needs beside the student's hidden states and head.

    teacher_hidden_ND: the teacher's last hidden states at the same tokens.
    teacher_head: the teacher's head; None where it is the student's own.
    tokens_N: the completion tokens; weights_N: each token's share in the sum, 0 where it is not part of the loss.
    old_log_probs_N: the sampler's log-probabilities (None: no importance weight), clipped at `is_clip`.
    """

    divergence: Divergence
    teacher_hidden_ND: Tensor
    teacher_head: HeadValues | None
    tokens_N: Tensor
    weights_N: Tensor
    old_log_probs_N: Tensor | None = None
    is_clip: float | None = None

    def per_token(self, student_logits_CV: Tensor, teacher_logits_CV: Tensor, chunk: slice) -> Tensor:
        """Divergence of each token of the chunk, importance weight included, [C]."""
        loss_C = self.divergence.per_token(student_logits_CV, teacher_logits_CV, self.tokens_N[chunk])
        if self.old_log_probs_N is None or self.is_clip is None:
            return loss_C
        log_probs_C = token_log_probs(student_logits_CV.detach() / self.divergence.temperature, self.tokens_N[chunk])
        return loss_C * importance_weight(log_probs_C, self.old_log_probs_N[chunk], self.is_clip)


def chunked_distillation_loss(
    hidden_ND: Tensor,
    head: HeadValues,
    terms: LossTerms,
    scale: Tensor,
    finish: LogitsTransform,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale x sum of weight x divergence, attached to the graph also when N is 0; the divergence of each token [N]).

    finish: what the model does to its logits after the head (scale, softcap).
    chunk_tokens: tokens per chunk; by default as many as CHUNK_ELEMENTS logits hold.
    """
    return _ChunkedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, terms, scale, finish, chunk_tokens)


def reference_distillation_loss(
    hidden_ND: Tensor, head: HeadValues, terms: LossTerms, scale: Tensor, finish: LogitsTransform
) -> tuple[Tensor, Tensor]:
    """The same, written plainly with whole [N, V] logits and autograd: what the chunked loss is tested against."""
    student_NV = finish(F.linear(hidden_ND, head.weight_VD, head.bias_V).float())
    teacher_head = terms.teacher_head or head
    with torch.no_grad():
        teacher_NV = finish(F.linear(terms.teacher_hidden_ND, teacher_head.weight_VD, teacher_head.bias_V).float())
    loss_N = terms.per_token(student_NV, teacher_NV, slice(None))
    return scale * (loss_N * terms.weights_N).sum(), loss_N.detach()


@torch.no_grad()
def chunked_token_log_probs(
    hidden_ND: Tensor,
    head: HeadValues,
    tokens_N: Tensor,
    temperature: float,
    finish: LogitsTransform,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probability of each token at the given temperature, [N] fp32, without a gradient."""
    projection = _Projection(head, hidden_ND, finish)
    log_probs_N = torch.empty(len(tokens_N), dtype=torch.float32, device=hidden_ND.device)
    for chunk in _chunks(len(tokens_N), head.weight_VD.shape[0], chunk_tokens):
        log_probs_N[chunk] = token_log_probs(projection.logits(hidden_ND[chunk]) / temperature, tokens_N[chunk])
    return log_probs_N


def _chunks(n: int, vocabulary: int, chunk_tokens: int | None) -> list[slice]:
    size = chunk_tokens or max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class _Projection:
    """A head in the dtype in which it multiplies: autocast's, where that is on, else its own; logits come as fp32."""

    def __init__(self, head: HeadValues, hidden_ND: Tensor, finish: LogitsTransform):
        self.device_type = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(self.device_type)
        self.dtype = torch.get_autocast_dtype(self.device_type) if autocast else head.weight_VD.dtype
        self.weight_VD = head.weight_VD.detach().to(self.dtype)
        self.bias_V = None if head.bias_V is None else head.bias_V.detach().to(self.dtype)
        self.finish = finish

    def raw_logits(self, hidden_CD: Tensor) -> Tensor:
        with torch.autocast(self.device_type, enabled=False):
            return F.linear(hidden_CD.to(self.dtype), self.weight_VD, self.bias_V).float()

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return self.finish(self.raw_logits(hidden_CD))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, terms: LossTerms, scale, finish, chunk_tokens):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        student = _Projection(HeadValues(weight_VD, bias_V), hidden_ND, finish)
        teacher = student if terms.teacher_head is None else _Projection(terms.teacher_head, hidden_ND, finish)
        grad_hidden_ND = torch.zeros_like(hidden_ND) if need_hidden else None
        # Chunks add up in fp32 whatever the weights are kept in.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        per_token_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)

        for chunk in _chunks(len(hidden_ND), weight_VD.shape[0], chunk_tokens):
            teacher_CV = teacher.logits(terms.teacher_hidden_ND[chunk])
            student_CV = student.raw_logits(hidden_ND[chunk]).requires_grad_()
            with torch.enable_grad(), torch.autocast(student.device_type, enabled=False):
                loss_C = terms.per_token(finish(student_CV), teacher_CV, chunk)
                weighted = (loss_C * terms.weights_N[chunk]).sum()
            total += weighted.detach()
            per_token_N[chunk] = loss_C.detach()
            if not (need_hidden or need_weight or need_bias):
                continue
            (grad_CV,) = torch.autograd.grad(weighted, student_CV)
            del teacher_CV, student_CV, loss_C, weighted
            if need_bias:
                grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(student.dtype)
            if need_hidden:
                grad_hidden_ND[chunk] = (grad_CV @ student.weight_VD).to(hidden_ND.dtype)
            if need_weight:
                grad_weight_VD += grad_CV.T @ hidden_ND[chunk].to(student.dtype)

        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V, scale)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(per_token_N)
        return total * scale, per_token_N

    @staticmethod
    def backward(ctx, grad_loss, _grad_per_token):
        *grads, scale = ctx.saved_tensors
        factor = grad_loss * scale
        scaled = [None if g is None else (g * factor).to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None
