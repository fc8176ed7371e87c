"""Token diagnostics: entropy, top-5 and top-k mass of student and teacher at a sample of loss tokens.

Used by metrics and displays of completions. Shapes: M sampled tokens, N loss tokens, C tokens per chunk, V vocabulary,
D hidden, K support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.loss.chunked import HeadValues, LogitsTransform, LossTerms, chunks_of, whole_logits

LIKELIEST = 5


@dataclass(frozen=True)
class DistributionStats:
    """The student's or teacher's distribution at each token, at the loss temperature; fp32.

    entropy_M: nats. likeliest_M5, probabilities_M5: top-5 tokens. mass_M: total probability of the student's top-K
    tokens; 1 if the loss is over the full vocabulary.
    """

    entropy_M: Tensor
    likeliest_M5: Tensor
    probabilities_M5: Tensor
    mass_M: Tensor

    def __getitem__(self, part: slice) -> "DistributionStats":
        return DistributionStats(*(values[part] for values in vars(self).values()))


@dataclass(frozen=True)
class TokenDiagnostics:
    """log_prob_M: the student's log-probability of the sampled token."""

    student: DistributionStats
    teacher: DistributionStats
    log_prob_M: Tensor

    def __len__(self) -> int:
        return len(self.log_prob_M)

    def __getitem__(self, part: slice) -> "TokenDiagnostics":
        return TokenDiagnostics(self.student[part], self.teacher[part], self.log_prob_M[part])

    @property
    def agree_M(self) -> Tensor:
        """Whether student and teacher have the same top-1 token."""
        return self.student.likeliest_M5[:, 0] == self.teacher.likeliest_M5[:, 0]


def evenly_spaced(n: int, most: int, device: torch.device) -> Tensor:
    """At most `most` evenly spaced indices into n tokens."""
    if n <= most:
        return torch.arange(n, device=device)
    return torch.linspace(0, n - 1, most, device=device).round().long()


@torch.no_grad()
def token_diagnostics(
    hidden_ND: Tensor, head: HeadValues, terms: LossTerms, finish: LogitsTransform, at_M: Tensor
) -> TokenDiagnostics:
    """Diagnostics of student and teacher at the loss tokens with indices at_M, with logits computed as in the loss."""
    teacher_head = head if terms.teacher_head is None else terms.teacher_head.beside(head)
    vocabulary = head.weight_VD.shape[0]
    parts = []
    for chunk in chunks_of(len(at_M), vocabulary, hidden_ND.device) or [slice(0, 0)]:
        at_C = at_M[chunk]
        student_CV = whole_logits(hidden_ND[at_C], head, finish)
        teacher_CV = terms.scaled(whole_logits(terms.teacher_hidden_ND[at_C], teacher_head, finish), at_C)
        student_CV, teacher_CV = (
            (logits_CV / terms.divergence.temperature).log_softmax(-1) for logits_CV in (student_CV, teacher_CV)
        )
        support = None
        if terms.divergence.has_support(vocabulary):
            support = terms.divergence.support_of(student_CV, teacher_CV)
        log_prob_C = student_CV.gather(-1, terms.tokens_N[at_C].unsqueeze(-1)).squeeze(-1)
        parts.append((_side(student_CV, support), _side(teacher_CV, support), log_prob_C))
    students, teachers, log_probs = zip(*parts, strict=True)
    return TokenDiagnostics(_joined(students), _joined(teachers), torch.cat(log_probs))


def _side(log_probs_CV: Tensor, support: tuple[Tensor, Tensor | None] | None) -> DistributionStats:
    probabilities_CV = log_probs_CV.exp()
    likeliest = probabilities_CV.topk(min(LIKELIEST, log_probs_CV.shape[-1]), dim=-1)
    entropy_C = -torch.where(probabilities_CV > 0, probabilities_CV * log_probs_CV, 0.0).sum(-1)
    mass_C = torch.ones_like(entropy_C)
    if support is not None:
        indices_CK, repeated_CK = support
        mass_CK = probabilities_CV.gather(-1, indices_CK)
        mass_C = (mass_CK if repeated_CK is None else mass_CK.masked_fill(repeated_CK, 0.0)).sum(-1)
    return DistributionStats(entropy_C, likeliest.indices, likeliest.values, mass_C)


def _joined(sides: tuple[DistributionStats, ...]) -> DistributionStats:
    return DistributionStats(
        *(torch.cat(values) for values in zip(*(vars(side).values() for side in sides), strict=True))
    )
