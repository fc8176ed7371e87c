"""The clipped policy loss of a token, mixed with its divergence.

Shapes: N loss tokens, C tokens per chunk, V vocabulary.
"""

from dataclasses import dataclass, field

from torch import Tensor, minimum

from sdft_ds.loss.chunked import LossTerms
from sdft_ds.loss.divergence import Divergence, token_log_probs


@dataclass(frozen=True)
class WholeLogits(Divergence):
    """Another divergence, computed from all logits, which the policy loss needs as well."""

    inner: Divergence = field(default_factory=Divergence)

    def per_token(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
        return self.inner.per_token(student_logits_NV, teacher_logits_NV, tokens_N)

    def needs_student_only(self, vocabulary: int) -> bool:
        return False

    def is_full(self, vocabulary: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class MixedTerms(LossTerms):
    """Loss terms of the divergence, where the token has a teacher with a context, and of the clipped policy loss.

    weight: share of the divergence. distills_N: 1 where it counts. divergence_N, policy_N, clipped_N: both losses of
    each token, and where the probability ratio is clipped, set by `per_token`.
    """

    weight: float
    clip: tuple[float, float]
    advantages_N: Tensor
    distills_N: Tensor
    anchors_N: Tensor | None
    divergence_N: Tensor
    policy_N: Tensor
    clipped_N: Tensor

    def per_token(self, student_logits_CV: Tensor, teacher_logits_CV: Tensor, chunk: slice) -> Tensor:
        divergence_C = super().per_token(student_logits_CV, teacher_logits_CV, chunk) * self.distills_N[chunk]
        log_probs_C = token_log_probs(student_logits_CV / self.divergence.temperature, self.tokens_N[chunk])
        old_C = log_probs_C.detach() if self.old_log_probs_N is None else self.old_log_probs_N[chunk]
        ratio_C, advantage_C = (log_probs_C - old_C).exp(), self.advantages_N[chunk]
        clipped_C = ratio_C.clamp(*self.clip)
        policy_C = -minimum(ratio_C * advantage_C, clipped_C * advantage_C)
        self.divergence_N[chunk] = divergence_C.detach()
        self.policy_N[chunk] = policy_C.detach()
        self.clipped_N[chunk] = (clipped_C * advantage_C < ratio_C * advantage_C).float()
        return self.weight * divergence_C + (1.0 - self.weight) * policy_C
