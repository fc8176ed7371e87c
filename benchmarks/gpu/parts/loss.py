"""The loss at the size of a 7B model, in chunks of every size: seconds, memory, and how far from fp64."""

import torch

from benchmarks.gpu import timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Setup
from sdft_ds.loss.chunked import HeadValues, LossTerms, chunked_distillation_loss
from sdft_ds.loss.divergence import CrossEntropy, Divergence

DIVERGENCES = {
    "full, alpha 0": Divergence(),
    "full, alpha 0.5": Divergence(alpha=0.5),
    "top-100, alpha 0.5": Divergence("topk_logits", alpha=0.5, topk=100),
    "cross entropy": CrossEntropy(),
}
# Nats per token, and share of the norm of the gradient. Logits that are rounded to bf16 cost about 1e-3 nats.
WITHIN = {torch.bfloat16: (4e-3, 0.1), torch.float32: (1e-4, 1e-3)}


def inputs(
    tokens: int,
    width: int,
    vocabulary: int,
    divergence: Divergence,
    device: str,
    dtype: torch.dtype,
    trained: bool = True,
) -> tuple[torch.Tensor, HeadValues, LossTerms]:
    """Hidden states, the head, and a teacher that is near."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(tokens, width, device=device)
    weight_VD = torch.randn(vocabulary, width, device=device).mul_(3 / width**0.5)
    teacher_ND = None
    if not isinstance(divergence, CrossEntropy):
        teacher_ND = (hidden_ND + 0.2 * torch.randn(tokens, width, device=device)).to(dtype)
    tokens_N = torch.randint(vocabulary, (tokens,), device=device)
    terms = LossTerms(divergence, teacher_ND, None, tokens_N, torch.ones(tokens, device=device))
    head = HeadValues(weight_VD.to(dtype).requires_grad_(trained))
    return hidden_ND.to(dtype).requires_grad_(), head, terms


def forward_and_backward(hidden_ND, head: HeadValues, terms: LossTerms, chunk_tokens: int | None = None):
    """(mean loss, gradient of the hidden states)"""
    hidden_ND.grad = head.weight_VD.grad = None
    scale = torch.tensor(1.0 / len(hidden_ND), device=hidden_ND.device)
    loss = chunked_distillation_loss(hidden_ND, head, terms, scale, None, chunk_tokens)[0]
    loss.backward()
    return loss.detach(), hidden_ND.grad


def in_fp64(hidden_ND: torch.Tensor, head: HeadValues, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on this CPU, with all logits at once and by autograd."""
    hidden_ND, weight_VD = hidden_ND.detach().double().cpu().requires_grad_(), head.weight_VD.detach().double().cpu()
    teacher_NV = None
    if terms.teacher_hidden_ND is not None:
        teacher_NV = terms.teacher_hidden_ND.double().cpu() @ weight_VD.T
    loss = terms.divergence.per_token(hidden_ND @ weight_VD.T, teacher_NV, terms.tokens_N.cpu()).mean()
    loss.backward()
    return loss.detach(), hidden_ND.grad


def run(setup: Setup, findings: Findings) -> None:
    for name, divergence in DIVERGENCES.items():
        for dtype in (torch.float32, torch.bfloat16):
            _check(setup, findings, name, divergence, dtype)
    for name, divergence in DIVERGENCES.items():
        _measure(setup, findings, name, divergence)
    findings.say(f"{len(DIVERGENCES)} losses against fp64")


def _check(setup: Setup, findings: Findings, name: str, divergence: Divergence, dtype: torch.dtype) -> None:
    made = inputs(*setup.sized((64, 3584, 32064), (8, 32, 264)), divergence, setup.device, dtype)
    (found, gradient), (wanted, reference) = forward_and_backward(*made), in_fp64(*made)
    off = abs(found.item() - wanted.item())
    gradient_off = ((gradient.cpu() - reference).norm() / reference.norm()).item()
    nats, share = WITHIN[dtype]
    if "top" in name and dtype == torch.bfloat16:
        share = 0.15  # rounding changes what is in the support
    findings.check(f"{name}, {str(dtype)[6:]}: nats and gradient off from fp64", off < nats and gradient_off < share,
                   [off, gradient_off])  # fmt: skip


def _measure(setup: Setup, findings: Findings, name: str, divergence: Divergence) -> None:
    """Seconds, and GB above the inputs, by number of elements of a chunk; the first is what training takes."""
    count, width, vocabulary = setup.sized((4096, 3584, 152064), (64, 32, 264))
    of_token = max(vocabulary, (divergence.topk or 0) * width)
    figures = {}
    for trained in (True, False):
        here = inputs(count, width, vocabulary, divergence, setup.device, torch.bfloat16, trained)
        for size in (None, *setup.sized((23, 24, 25, 26, 27), (12, 13))):
            tokens = None if size is None else max(1, 2**size // of_token)
            before = _peak(setup, reset=True)
            seconds = timing.median_seconds(lambda: forward_and_backward(*here, tokens), times=2)  # noqa: B023
            row = figures.setdefault("as trained" if size is None else f"2^{size}", {})
            row |= {f"s, head {'trained' if trained else 'frozen'}": seconds,
                    f"GB, head {'trained' if trained else 'frozen'}": (_peak(setup) - before) / 1e9}  # fmt: skip
    findings.figure(f"{name}: by elements of a chunk", figures)
    findings.figure(f"{name}: fastest chunk", min(figures, key=lambda size: figures[size]["s, head trained"]))


def _peak(setup: Setup, reset: bool = False) -> int:
    if not setup.on_gpu:
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()
