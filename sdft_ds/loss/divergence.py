"""Per-token divergences between student and teacher distributions, as pure functions.

Shapes: N tokens, V vocabulary, K support. Everything is in nats and in the input dtype (use fp32).
Formulas: the SDFT paper (arXiv 2601.19897) and, between the end points, the generalised Jensen-Shannon divergence of
arXiv 2306.13649 (GKD).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """The divergence used as the loss of a token.

    mode: `full_logits` (full vocabulary), `topk_logits` (the `topk` largest logits of a side) or `sampled_token`.
    support: with top-k, whose: `student`, `teacher`, or `union` of both. A token that only the teacher considers
    likely gets no gradient of its own on the student's.
    alpha: 0 is KL(teacher||student), 1 is KL(student||teacher), between is the generalised JSD.
    add_tail: with top-k, keep the remaining mass as one more bucket instead of renormalising.
    temperature: divides the logits of student and teacher.
    """

    mode: str = "full_logits"
    alpha: float = 0.0
    topk: int | None = None
    add_tail: bool = False
    temperature: float = 1.0
    support: str = "student"

    def per_token(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """Loss of each token, [N], differentiable w.r.t. the student's logits; pass the teacher's detached."""
        student_logits_NV = student_logits_NV / self.temperature
        teacher_logits_NV = teacher_logits_NV / self.temperature
        if self.mode == "sampled_token":
            return sampled_token_surrogate(
                token_log_probs(student_logits_NV, tokens_N), token_log_probs(teacher_logits_NV, tokens_N)
            )
        if self.has_support(student_logits_NV.shape[-1]):
            indices_NK, repeated_NK = self.support_of(student_logits_NV, teacher_logits_NV)
            student, teacher = (
                log_probs_on(logits_NV, indices_NK, repeated_NK, self.add_tail)
                for logits_NV in (student_logits_NV, teacher_logits_NV)
            )
        else:
            student, teacher = student_logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
        return interpolated_divergence(student, teacher, self.alpha)

    def has_support(self, vocabulary: int) -> bool:
        """Whether the loss of a token is restricted to the top-k of a larger vocabulary."""
        return self.mode == "topk_logits" and self.topk < vocabulary

    def needs_student_only(self, vocabulary: int) -> bool:
        """Whether the support follows from the student's logits alone, and nothing beside it counts."""
        return self.has_support(vocabulary) and self.support == "student" and not self.add_tail

    def support_of(self, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens of the support [N, K], and where K repeats one [N, K]; None where it cannot. K is topk, or twice
        as many for a union."""
        sides = {"student": (student_NV,), "teacher": (teacher_NV,), "union": (student_NV, teacher_NV)}[self.support]
        parts = [side.detach().topk(self.topk, dim=-1).indices for side in sides]
        if len(parts) == 1:
            return parts[0], None
        first, second = parts
        in_both = torch.zeros_like(student_NV, dtype=torch.bool).scatter_(-1, first, True).gather(-1, second)
        return torch.cat(parts, dim=-1), torch.cat([torch.zeros_like(in_both), in_both], dim=-1)

    def is_full(self, vocabulary: int) -> bool:
        """Whether the loss of a token is over the full vocabulary."""
        return self.mode == "full_logits" or (self.mode == "topk_logits" and self.topk >= vocabulary)

    def on_support(self, student_logits_NK: Tensor, teacher_logits_NK: Tensor) -> Tensor:
        """Loss of each token from both logits on the student's top-k alone, [N]; only without a tail."""
        student = (student_logits_NK / self.temperature).log_softmax(-1)
        teacher = (teacher_logits_NK / self.temperature).log_softmax(-1)
        return interpolated_divergence(student, teacher, self.alpha)


# distillation_mode -> class that computes it. Custom modes subclass Divergence and override `per_token`.
MODES: dict[str, type[Divergence]] = dict.fromkeys(("topk_logits", "full_logits", "sampled_token"), Divergence)


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """Cross entropy in place of a divergence: -log of the student's probability of a given token; no teacher."""

    mode: str = "cross_entropy"

    def per_token(self, student_logits_NV: Tensor, teacher_logits_NV: None, tokens_N: Tensor) -> Tensor:
        """Loss of each token, [N]."""
        return -token_log_probs(student_logits_NV / self.temperature, tokens_N)


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    """KL(p||q) over the last dimension, from log-probabilities; terms with p = 0 are 0 for any q."""
    p = p_log.exp()
    return torch.where(p > 0, p * (p_log - q_log), 0.0).sum(-1)


def interpolated_divergence(student_NK: Tensor, teacher_NK: Tensor, alpha: float) -> Tensor:
    """alpha 0: KL(t||s), alpha 1: KL(s||t), in between: (1-alpha) KL(s||m) + alpha KL(t||m); [N].

    m = (1-alpha) s + alpha t, in probabilities. The end points are special cases, not limits: the formula in between
    tends to 0 there.
    """
    if alpha == 0.0:
        return kl(teacher_NK, student_NK)
    if alpha == 1.0:
        return kl(student_NK, teacher_NK)
    mixture_NK = torch.logaddexp(student_NK + math.log(1.0 - alpha), teacher_NK + math.log(alpha))
    return (1.0 - alpha) * kl(student_NK, mixture_NK) + alpha * kl(teacher_NK, mixture_NK)


def interpolated_divergence_and_gradient(
    student_NV: Tensor, teacher_NV: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """`interpolated_divergence` [N], and its gradient w.r.t. the student's logits [N, V], from log-probabilities.

    The closed form takes half of autograd's memory. With m the mixture (the teacher at alpha 1), the gradient is
    s (log s - log m - KL(s||m)), times (1 - alpha) between the end points; s - t at alpha 0. Overwrites the teacher's
    log-probabilities.
    """
    if alpha == 0.0:
        teacher = teacher_NV.exp()
        terms = teacher_NV.sub_(student_NV).mul_(teacher).masked_fill_(teacher == 0, 0.0)
        return terms.sum(-1), student_NV.exp().sub_(teacher)
    student = student_NV.exp()
    if alpha == 1.0:
        ratio, weight, rest = student_NV - teacher_NV, 1.0, 0.0
    else:
        mixture_NV = torch.logaddexp(student_NV + math.log(1.0 - alpha), teacher_NV + math.log(alpha))
        teacher = teacher_NV.exp()
        terms = teacher_NV.sub_(mixture_NV).mul_(teacher).masked_fill_(teacher == 0, 0.0)
        rest = alpha * terms.sum(-1)
        del terms, teacher
        ratio, weight = torch.sub(student_NV, mixture_NV, out=mixture_NV), 1.0 - alpha
    ratio.masked_fill_(student == 0, 0.0)
    divergence_N1 = (student * ratio).sum(-1, keepdim=True)
    loss_N = weight * divergence_N1.squeeze(-1) + rest
    return loss_N, ratio.sub_(divergence_N1).mul_(student).mul_(weight)


# In the place of the logit of a repeated token: its probability is exactly 0, and differences stay finite.
_NOWHERE = -1e30


def log_probs_on(logits_NV: Tensor, indices_NK: Tensor, repeated_NK: Tensor | None, add_tail: bool) -> Tensor:
    """Log-probabilities on a support: renormalized [N, K], or with the rest as one more bucket [N, K + 1].

    repeated_NK: entries that count as nothing. The bucket is summed from the remaining logits themselves, not as 1 -
    sum, which loses all digits when the support holds nearly all of the mass.
    """
    kept_NK = logits_NV.gather(-1, indices_NK)
    if repeated_NK is not None:
        kept_NK = kept_NK.masked_fill(repeated_NK, _NOWHERE)
    if not add_tail:
        return kept_NK.log_softmax(-1)
    rest_N1 = logits_NV.scatter(-1, indices_NK, float("-inf")).logsumexp(-1, keepdim=True)
    rest_N1 = rest_N1.clamp(min=_NOWHERE)  # a union may be the full vocabulary
    return torch.cat([kept_NK, rest_N1], dim=-1).log_softmax(-1)


def token_log_probs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability of each given token, [N]."""
    return -F.cross_entropy(logits_NV, tokens_N, reduction="none")


def sampled_token_surrogate(student_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Signed surrogate whose expected gradient over the student's samples is that of KL(student||teacher)."""
    return (student_N - teacher_N).detach() * student_N


def importance_weight(student_N: Tensor, old_N: Tensor, clip: float) -> Tensor:
    """min(exp(log s - log s_old), clip), detached, [N]: corrects for off-policy rollouts, older than the weights."""
    return (student_N - old_N).detach().exp().clamp(max=clip)
