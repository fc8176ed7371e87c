"""Per-token divergences between student and teacher distributions, as pure functions.

Shapes: N tokens, V vocabulary, K support. Everything is in nats and in the input dtype (use fp32).
Formulas: the SDFT paper (arXiv 2601.19897) and, between the end points, the generalised Jensen-Shannon divergence of
arXiv 2306.13649 (GKD).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """The divergence used as the loss of a token.

    mode: `full_logits` (full vocabulary), `topk_logits` (the student's `topk` largest logits) or `sampled_token`.
    alpha: 0 is KL(teacher||student), 1 is KL(student||teacher), in between the generalised JSD.
    add_tail: with top-k, keep the remaining mass as one more bucket instead of renormalising.
    temperature: divides the logits of student and teacher.
    """

    mode: str = "full_logits"
    alpha: float = 0.0
    topk: int | None = None
    add_tail: bool = False
    temperature: float = 1.0

    def per_token(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        """Loss of each token, [N], differentiable w.r.t. the student's logits; pass the teacher's detached."""
        student_logits_NV = student_logits_NV / self.temperature
        teacher_logits_NV = teacher_logits_NV / self.temperature
        if self.mode == "sampled_token":
            return sampled_token_surrogate(
                token_log_probs(student_logits_NV, tokens_N), token_log_probs(teacher_logits_NV, tokens_N)
            )
        if self.has_support(student_logits_NV.shape[-1]):
            student, teacher = topk_log_probs(student_logits_NV, teacher_logits_NV, self.topk, self.add_tail)
        else:
            student, teacher = student_logits_NV.log_softmax(-1), teacher_logits_NV.log_softmax(-1)
        return interpolated_divergence(student, teacher, self.alpha)

    def has_support(self, vocabulary: int) -> bool:
        """Whether the loss of a token is restricted to the top-k of a larger vocabulary."""
        return self.mode == "topk_logits" and self.topk < vocabulary

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
class CrossEntropy:
    """Cross entropy in place of a divergence: -log of the student's probability of a given token; no teacher."""

    temperature: float = 1.0

    def per_token(self, student_logits_NV: Tensor, teacher_logits_NV: None, tokens_N: Tensor) -> Tensor:
        """Loss of each token, [N]."""
        return -token_log_probs(student_logits_NV / self.temperature, tokens_N)

    def has_support(self, vocabulary: int) -> bool:
        return False

    def is_full(self, vocabulary: int) -> bool:
        return False


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
    log_alpha = torch.tensor(alpha, dtype=student_NK.dtype, device=student_NK.device).log()
    log_rest = torch.tensor(1.0 - alpha, dtype=student_NK.dtype, device=student_NK.device).log()
    mixture_NK = torch.logaddexp(student_NK + log_rest, teacher_NK + log_alpha)
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
        log_alpha, log_rest = (torch.tensor(x, dtype=torch.float64).log().item() for x in (alpha, 1.0 - alpha))
        mixture_NV = torch.logaddexp(student_NV + log_rest, teacher_NV + log_alpha)
        teacher = teacher_NV.exp()
        terms = teacher_NV.sub_(mixture_NV).mul_(teacher).masked_fill_(teacher == 0, 0.0)
        rest = alpha * terms.sum(-1)
        del terms, teacher
        ratio, weight = torch.sub(student_NV, mixture_NV, out=mixture_NV), 1.0 - alpha
    ratio.masked_fill_(student == 0, 0.0)
    divergence_N1 = (student * ratio).sum(-1, keepdim=True)
    loss_N = weight * divergence_N1.squeeze(-1) + rest
    return loss_N, ratio.sub_(divergence_N1).mul_(student).mul_(weight)


def topk_log_probs(student_NV: Tensor, teacher_NV: Tensor, k: int, add_tail: bool) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities on the student's top-k: renormalised [N, k], or with the rest as one
    bucket [N, k + 1].

    k must be smaller than V. The bucket is summed from the remaining logits, not as 1 - sum(top-k), which loses all
    precision when the top-k holds nearly all of the mass.
    """
    indices_NK = student_NV.detach().topk(k, dim=-1).indices

    def on_support(logits_NV: Tensor) -> Tensor:
        kept_NK = logits_NV.gather(-1, indices_NK)
        if not add_tail:
            return kept_NK.log_softmax(-1)
        rest_N1 = logits_NV.scatter(-1, indices_NK, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([kept_NK, rest_N1], dim=-1).log_softmax(-1)

    return on_support(student_NV), on_support(teacher_NV)


def token_log_probs(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """Log-probability of each given token, [N]."""
    return -F.cross_entropy(logits_NV, tokens_N, reduction="none")


def sampled_token_surrogate(student_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Signed surrogate whose expected gradient over the student's samples is that of KL(student||teacher)."""
    return (student_N - teacher_N).detach() * student_N


def importance_weight(student_N: Tensor, old_N: Tensor, clip: float) -> Tensor:
    """min(exp(log s - log s_old), clip), detached, [N]: corrects for off-policy rollouts, older than the weights."""
    return (student_N - old_N).detach().exp().clamp(max=clip)
