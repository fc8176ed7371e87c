"""Chunked loss: LM head and divergence, one chunk of tokens at a time, so that [N, V] logits are never materialized.

Shapes: N loss tokens, C tokens per chunk, V vocabulary, D hidden, K support (top-k), Q adapter rank.

Memory in addition to the hidden states and the head's gradient: O(C x V). The forward computes each chunk's logits,
loss and gradient; the backward only scales the gradients. The sum of weight x loss is kept unscaled: the scale
(1 / loss tokens of the optimizer step) is applied at the end in fp32, where it cannot make half-precision gradients
underflow.

With top-k support and no tail, only K teacher logits and K gradients per token are needed: they are computed with
those K rows of the head, instead of three products with all V.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft_ds.loss.divergence import (
    Divergence,
    importance_weight,
    interpolated_divergence_and_gradient,
    token_log_probs,
)

LogitsTransform = Callable[[Tensor], Tensor] | None

# Elements of one chunk's logits; 8 Mi fp32 elements are 32 MB, and a full-vocabulary loss holds about seven of them.
# Each chunk reads the head several times, and the gradient of a trained one, so on a GPU chunks are larger.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CUDA = 1 << 23, 1 << 26


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on the head: logits += scale x hidden A^T B^T, with A [Q, D] and B [V, Q]."""

    down_QD: Tensor
    up_VQ: Tensor
    scale: float


@dataclass(frozen=True)
class HeadValues:
    """Snapshot of an LM head's values: weight [V, D], bias [V] or None, adapter or None.

    Of a teacher's head, a weight or bias of None is the student's, which does not change.
    """

    weight_VD: Tensor | None
    bias_V: Tensor | None = None
    adapter: Adapter | None = None

    def beside(self, student: "HeadValues") -> "HeadValues":
        """This head, with the student's weight and bias in place of those that are None."""
        return HeadValues(
            student.weight_VD if self.weight_VD is None else self.weight_VD,
            student.bias_V if self.bias_V is None else self.bias_V,
            self.adapter,
        )


@dataclass(frozen=True)
class LossTerms:
    """Inputs of the loss of N completion tokens, in addition to the student's hidden states and head.

    teacher_hidden_ND: the teacher's last hidden states at the same tokens; None for cross entropy.
    teacher_head: the teacher's head; None if it is the student's. teacher_scale_N: factor of the teacher's logits of
    each token, before the divergence's temperature; None for 1.
    tokens_N: the completion tokens; weights_N: loss weight of each token, 0 if excluded from the loss.
    old_log_probs_N: log-probabilities when sampled (None: no importance weight); is_clip: maximum importance weight.
    with_log_probs: also return the student's log-probability of each token.
    """

    divergence: Divergence
    teacher_hidden_ND: Tensor | None
    teacher_head: HeadValues | None
    tokens_N: Tensor
    weights_N: Tensor
    old_log_probs_N: Tensor | None = None
    is_clip: float | None = None
    with_log_probs: bool = False
    teacher_scale_N: Tensor | None = None

    def scaled(self, teacher_logits_CV: Tensor, chunk: slice | Tensor) -> Tensor:
        """The teacher's logits of the tokens of a chunk, [C, V] or [C, K], times their factors; overwrites them."""
        if self.teacher_scale_N is None:
            return teacher_logits_CV
        return teacher_logits_CV.mul_(self.teacher_scale_N[chunk].unsqueeze(-1))

    def per_token(self, student_logits_CV: Tensor, teacher_logits_CV: Tensor, chunk: slice) -> Tensor:
        """Divergence of each token of the chunk, including the importance weight, [C]."""
        loss_C = self.divergence.per_token(student_logits_CV, teacher_logits_CV, self.tokens_N[chunk])
        return self._weighted(loss_C, student_logits_CV, chunk)

    def per_token_on_support(
        self, student_CK: Tensor, teacher_CK: Tensor, student_logits_CV: Tensor, chunk: slice
    ) -> Tensor:
        """`per_token` from the logits on a top-k support, [C]; student_logits_CV: for the importance weight."""
        return self._weighted(self.divergence.on_support(student_CK, teacher_CK), student_logits_CV, chunk)

    @property
    def _importance_counts(self) -> bool:
        return self.old_log_probs_N is not None and self.is_clip is not None

    def _weighted(self, loss_C: Tensor, student_logits_CV: Tensor, chunk: slice) -> Tensor:
        if not self._importance_counts:
            return loss_C
        log_probs_C = self.log_probs(student_logits_CV, chunk)
        return loss_C * importance_weight(log_probs_C, self.old_log_probs_N[chunk], self.is_clip)

    def log_probs(self, student_logits_CV: Tensor, chunk: slice) -> Tensor:
        """The student's log-probability of each token of the chunk at the loss temperature, [C], without grad."""
        return token_log_probs(student_logits_CV.detach() / self.divergence.temperature, self.tokens_N[chunk])

    def full_with_gradient(
        self, student_logits_CV: Tensor, teacher_logits_CV: Tensor, chunk: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`per_token` over the full vocabulary [C], the gradient of the sum of weight x loss w.r.t. the student's
        logits [C, V], and the student's log-probability of each token [C]. Overwrites both logits."""
        temperature = self.divergence.temperature
        for logits_CV in (student_logits_CV, teacher_logits_CV):
            logits_CV.div_(temperature)
            logits_CV.sub_(logits_CV.amax(-1, keepdim=True))  # first, or large logits lose precision
            logits_CV.sub_(logits_CV.logsumexp(-1, keepdim=True))
        log_probs_C = student_logits_CV.gather(-1, self.tokens_N[chunk].unsqueeze(-1)).squeeze(-1)
        factor_C = torch.ones_like(self.weights_N[chunk])
        if self._importance_counts:
            factor_C = importance_weight(log_probs_C, self.old_log_probs_N[chunk], self.is_clip)
        loss_C, grad_CV = interpolated_divergence_and_gradient(
            student_logits_CV, teacher_logits_CV, self.divergence.alpha
        )
        grad_CV.mul_((factor_C * self.weights_N[chunk] / temperature).unsqueeze(-1))
        return loss_C * factor_C, grad_CV, log_probs_C


def chunked_distillation_loss(
    hidden_ND: Tensor,
    head: HeadValues,
    terms: LossTerms,
    scale: Tensor,
    finish: LogitsTransform,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scale x sum of weight x divergence, attached to the graph even if N is 0; the divergence of each token [N];
    with terms.with_log_probs the student's log-probability of each token [N]).

    finish: the model's logits transform after the head (scale, softcap); None: identity.
    chunk_tokens: tokens per chunk; by default as many as fit into `chunk_elements` logits.
    """
    adapter = (None, None, 0.0) if head.adapter is None else tuple(vars(head.adapter).values())
    others = terms, scale, finish, chunk_tokens, torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, *adapter, *others)


def reference_distillation_loss(
    hidden_ND: Tensor, head: HeadValues, terms: LossTerms, scale: Tensor, finish: LogitsTransform
) -> tuple[Tensor, Tensor]:
    """Reference implementation with full [N, V] logits and autograd, which the chunked loss is tested against."""
    finish = finish or identity
    student_NV = finish(_plain_logits(hidden_ND, head))
    with torch.no_grad():
        teacher_head = head if terms.teacher_head is None else terms.teacher_head.beside(head)
        teacher_NV = terms.scaled(finish(_plain_logits(terms.teacher_hidden_ND, teacher_head)), slice(None))
    loss_N = terms.per_token(student_NV, teacher_NV, slice(None))
    return scale * (loss_N * terms.weights_N).sum(), loss_N.detach()


def identity(logits: Tensor) -> Tensor:
    return logits


def _plain_logits(hidden_ND: Tensor, head: HeadValues) -> Tensor:
    logits_NV = F.linear(hidden_ND, head.weight_VD, head.bias_V).float()
    if head.adapter is None:
        return logits_NV
    return logits_NV + head.adapter.scale * (hidden_ND @ head.adapter.down_QD.T @ head.adapter.up_VQ.T).float()


@torch.no_grad()
def chunked_token_log_probs(
    hidden_ND: Tensor,
    head: HeadValues,
    tokens_N: Tensor,
    temperature: float,
    finish: LogitsTransform,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probability of each token at the given temperature, [N] fp32, without grad."""
    projection = _Projection(head, hidden_ND, finish)
    log_probs_N = torch.empty(len(tokens_N), dtype=torch.float32, device=hidden_ND.device)
    for chunk in chunks_of(len(tokens_N), head.weight_VD.shape[0], hidden_ND.device, chunk_tokens):
        log_probs_N[chunk] = token_log_probs(projection.logits(hidden_ND[chunk]) / temperature, tokens_N[chunk])
    return log_probs_N


def whole_logits(hidden_ND: Tensor, head: HeadValues, finish: LogitsTransform) -> Tensor:
    """Full [N, V] fp32 logits, computed as in the loss, without grad: for a few tokens."""
    return _Projection(head, hidden_ND, finish).logits(hidden_ND)


def chunk_elements(device_type: str) -> int:
    """Elements of one chunk's logits on this type of device."""
    return CHUNK_ELEMENTS_CUDA if device_type == "cuda" else CHUNK_ELEMENTS


def chunks_of(n: int, elements_per_token: int, device: torch.device, chunk_tokens: int | None = None) -> list[slice]:
    """Slices of n tokens, each of chunk_tokens, or of as many as fit into the device's chunk_elements."""
    size = chunk_tokens or max(1, chunk_elements(device.type) // elements_per_token)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def has_fp32_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether matrix products of operands of this dtype can be returned in fp32, as they were accumulated: torch's
    out_dtype, on CUDA only. Rounded to bf16 first, logits from 16 to 32 are off by up to 0.06."""
    return device_type == "cuda" and torch.version.hip is None and dtype in (torch.bfloat16, torch.float16)


def _fp32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, of matrices or batches of them; rounded to the operands' dtype first where it has to be."""
    if has_fp32_products(a.device.type, a.dtype):
        return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return (a @ b).float()


class _Projection:
    """An LM head in its compute dtype: autocast's if enabled, else its own; returns fp32 logits."""

    def __init__(self, head: HeadValues, hidden_ND: Tensor, finish: LogitsTransform):
        self.device_type = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(self.device_type)
        self.dtype = torch.get_autocast_dtype(self.device_type) if autocast else head.weight_VD.dtype
        self.weight_VD = head.weight_VD.detach().to(self.dtype)
        self.bias_V = None if head.bias_V is None else head.bias_V.detach().to(self.dtype)
        self.adapter = head.adapter
        if self.adapter is not None:
            factors = (self.adapter.down_QD, self.adapter.up_VQ)
            # As in PEFT: in autocast's dtype, else in the adapter's.
            down_QD, up_VQ = (f.detach().to(self.dtype) if autocast else f.detach() for f in factors)
            self.adapter = Adapter(down_QD, up_VQ, self.adapter.scale)
        self.finish = finish or identity

    def raw_logits(self, hidden_CD: Tensor) -> Tensor:
        with torch.autocast(self.device_type, enabled=False):
            if has_fp32_products(self.device_type, self.dtype):
                logits_CV = _fp32_product(hidden_CD.to(self.dtype), self.weight_VD.T)
                if self.bias_V is not None:
                    logits_CV += self.bias_V
            else:
                logits_CV = F.linear(hidden_CD.to(self.dtype), self.weight_VD, self.bias_V).float()
            if self.adapter is not None:
                logits_CV += self.adapter.scale * _fp32_product(self.low_rank(hidden_CD), self.adapter.up_VQ.T)
            return logits_CV

    def low_rank(self, hidden_CD: Tensor) -> Tensor:
        return hidden_CD.to(self.adapter.down_QD.dtype) @ self.adapter.down_QD.T

    def logits(self, hidden_CD: Tensor) -> Tensor:
        return self.finish(self.raw_logits(hidden_CD))

    def logits_at(self, hidden_CD: Tensor, indices_CK: Tensor) -> Tensor:
        """Logits of K vocabulary entries per position, [C, K]; only without an adapter."""
        with torch.autocast(self.device_type, enabled=False):
            rows_CKD = self.weight_VD[indices_CK]
            raw_CK = _fp32_product(rows_CKD, hidden_CD.to(self.dtype).unsqueeze(-1)).squeeze(-1)
            return self.finish(raw_CK if self.bias_V is None else raw_CK + self.bias_V[indices_CK])


class _Gradients:
    """Gradients accumulated over chunks: in fp32 for weights of any dtype; None where not required."""

    def __init__(self, hidden_ND: Tensor, head: HeadValues, projection: _Projection, needed: list[bool]):
        self.hidden_ND, self.projection, self.any = hidden_ND, projection, any(needed)
        adapter = (None, None) if head.adapter is None else (head.adapter.down_QD, head.adapter.up_VQ)
        self.hidden, self.weight, self.bias, self.down, self.up = (
            torch.zeros_like(tensor, dtype=tensor.dtype if tensor is hidden_ND else torch.float32) if need else None
            for tensor, need in zip((hidden_ND, head.weight_VD, head.bias_V, *adapter), needed, strict=True)
        )

    def add(self, grad_CV: Tensor, chunk: slice) -> None:
        """Accumulate from the gradient w.r.t. a chunk's raw logits."""
        if not self.any:
            return
        head, hidden_CD = self.projection, self.hidden_ND[chunk]
        if self.bias is not None:
            self.bias += grad_CV.sum(0)
        adapter = head.adapter
        if adapter is not None:
            grad_low_CQ = adapter.scale * (grad_CV.to(adapter.up_VQ.dtype) @ adapter.up_VQ)
            if self.up is not None:
                self.up += adapter.scale * (grad_CV.to(adapter.up_VQ.dtype).T @ head.low_rank(hidden_CD))
            if self.down is not None:
                self.down += grad_low_CQ.T @ hidden_CD.to(grad_low_CQ.dtype)
        grad_CV = grad_CV.to(head.dtype)
        if self.hidden is not None:
            grad_CD = grad_CV @ head.weight_VD
            if adapter is not None:
                grad_CD = grad_CD + (grad_low_CQ @ adapter.down_QD).to(grad_CD.dtype)
            self.hidden[chunk] = grad_CD.to(self.hidden.dtype)
        if self.weight is not None:
            if head.dtype == torch.float32:
                self.weight.addmm_(grad_CV.T, hidden_CD.to(head.dtype))
            elif has_fp32_products(head.device_type, head.dtype):  # without a product as large as the gradient
                operands = grad_CV.T, hidden_CD.to(head.dtype)
                torch.addmm(self.weight, *operands, out_dtype=torch.float32, out=self.weight)
            else:
                self.weight += grad_CV.T @ hidden_CD.to(head.dtype)

    def add_at(self, grad_CK: Tensor, indices_CK: Tensor, chunk: slice) -> None:
        """Accumulate from the gradient w.r.t. the raw logits of K vocabulary entries per position; only without an
        adapter."""
        head, hidden_CD = self.projection, self.hidden_ND[chunk]
        flat = indices_CK.flatten()
        if self.bias is not None:
            self.bias.index_add_(0, flat, grad_CK.flatten())
        if self.hidden is not None:
            rows_CKD = head.weight_VD[indices_CK]
            grad_CD = torch.bmm(grad_CK.to(head.dtype).unsqueeze(1), rows_CKD).squeeze(1)
            self.hidden[chunk] = grad_CD.to(self.hidden.dtype)
        if self.weight is not None:
            outer_CKD = grad_CK.unsqueeze(-1) * hidden_CD.float().unsqueeze(1)
            self.weight.index_add_(0, flat, outer_CKD.flatten(0, 1))


# Each of these returns the divergence of each token of the chunk, [C], and with terms.with_log_probs the student's
# log-probability of it, [C].
_OfChunk = tuple[Tensor, Tensor | None]


def _full_chunk(student, teacher, hidden_CD, terms: LossTerms, gradients: _Gradients, chunk: slice) -> _OfChunk:
    """Full vocabulary, with a closed-form gradient."""
    raw_CV = student.raw_logits(hidden_CD)
    teacher_CV = terms.scaled(teacher.logits(terms.teacher_hidden_ND[chunk]), chunk)
    if student.finish is identity:
        loss_C, grad_CV, log_probs_C = terms.full_with_gradient(raw_CV, teacher_CV, chunk)
    else:
        with torch.enable_grad():
            finished_CV = student.finish(raw_CV.requires_grad_())
        detached_CV = finished_CV.detach().clone()
        loss_C, grad_CV, log_probs_C = terms.full_with_gradient(detached_CV, teacher_CV, chunk)
        (grad_CV,) = torch.autograd.grad(finished_CV, raw_CV, grad_CV)
    del raw_CV, teacher_CV  # free the memory before the matrix products
    gradients.add(grad_CV, chunk)
    return loss_C, log_probs_C


def _sparse_chunk(student, teacher, hidden_CD, terms: LossTerms, gradients: _Gradients, chunk: slice) -> _OfChunk:
    """Top-k support without a tail: K teacher logits and K gradients per token."""
    raw_CV = student.raw_logits(hidden_CD)
    finished_CV = student.finish(raw_CV)
    indices_CK = finished_CV.topk(terms.divergence.topk, dim=-1).indices
    teacher_CK = terms.scaled(teacher.logits_at(terms.teacher_hidden_ND[chunk], indices_CK), chunk)
    raw_CK = raw_CV.gather(-1, indices_CK).requires_grad_()
    with torch.enable_grad(), torch.autocast(student.device_type, enabled=False):
        loss_C = terms.per_token_on_support(student.finish(raw_CK), teacher_CK, finished_CV, chunk)
        (grad_CK,) = torch.autograd.grad((loss_C * terms.weights_N[chunk]).sum(), raw_CK)
    log_probs_C = terms.log_probs(finished_CV, chunk) if terms.with_log_probs else None
    del raw_CV, finished_CV
    gradients.add_at(grad_CK, indices_CK, chunk)
    return loss_C.detach(), log_probs_C


def _other_chunk(student, teacher, hidden_CD, terms: LossTerms, gradients: _Gradients, chunk: slice) -> _OfChunk:
    """Any other divergence, with the gradient from autograd."""
    teacher_CV = None
    if terms.teacher_hidden_ND is not None:
        teacher_CV = terms.scaled(teacher.logits(terms.teacher_hidden_ND[chunk]), chunk)
    raw_CV = student.raw_logits(hidden_CD).requires_grad_()
    with torch.enable_grad(), torch.autocast(student.device_type, enabled=False):
        finished_CV = student.finish(raw_CV)
        loss_C = terms.per_token(finished_CV, teacher_CV, chunk)
        (grad_CV,) = torch.autograd.grad((loss_C * terms.weights_N[chunk]).sum(), raw_CV)
    log_probs_C = terms.log_probs(finished_CV, chunk) if terms.with_log_probs else None
    loss_C = loss_C.detach()
    del raw_CV, finished_CV, teacher_CV
    gradients.add(grad_CV, chunk)
    return loss_C, log_probs_C


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND, weight_VD, bias_V, down_QD, up_VQ, adapter_scale, terms, scale, finish, chunk_tokens, has_grad
    ):
        adapter = None if down_QD is None else Adapter(down_QD, up_VQ, adapter_scale)
        head = HeadValues(weight_VD, bias_V, adapter)
        student = _Projection(head, hidden_ND, finish)
        teacher = student
        if terms.teacher_head is not None:
            teacher = _Projection(terms.teacher_head.beside(head), hidden_ND, finish)
        # needs_input_grad is that of the weights, under no_grad as well.
        needed = [has_grad and need for need in ctx.needs_input_grad[:5]]
        gradients = _Gradients(hidden_ND, head, student, needed)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        per_token_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        log_probs_N = torch.zeros_like(per_token_N) if terms.with_log_probs else None
        divergence, vocabulary = terms.divergence, weight_VD.shape[0]
        sparse = divergence.needs_student_only(vocabulary) and student.adapter is None and teacher.adapter is None
        elements = max(vocabulary, divergence.topk * weight_VD.shape[1]) if sparse else vocabulary

        for chunk in chunks_of(len(hidden_ND), elements, hidden_ND.device, chunk_tokens):
            if sparse:
                loss_C, log_probs_C = _sparse_chunk(student, teacher, hidden_ND[chunk], terms, gradients, chunk)
            elif divergence.is_full(vocabulary):
                loss_C, log_probs_C = _full_chunk(student, teacher, hidden_ND[chunk], terms, gradients, chunk)
            else:
                loss_C, log_probs_C = _other_chunk(student, teacher, hidden_ND[chunk], terms, gradients, chunk)
            per_token_N[chunk] = loss_C
            if log_probs_N is not None:
                log_probs_N[chunk] = log_probs_C
            total += (loss_C * terms.weights_N[chunk]).sum()

        found = (gradients.hidden, gradients.weight, gradients.bias, gradients.down, gradients.up)
        ctx.save_for_backward(*found, scale)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden_ND, weight_VD, bias_V, down_QD, up_VQ)]
        ctx.mark_non_differentiable(per_token_N, *([] if log_probs_N is None else [log_probs_N]))
        return total * scale, per_token_N, log_probs_N

    @staticmethod
    def backward(ctx, grad_loss, *_others):
        *grads, scale = ctx.saved_tensors
        factor = grad_loss * scale
        # In place: the gradients are private to this function, and a second backward is not possible anyway.
        scaled = [None if g is None else g.mul_(factor).to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None, None, None
