import itertools
from dataclasses import replace

import pytest
import torch

from sdft_ds.loss import chunked
from sdft_ds.loss.chunked import (
    Adapter,
    HeadValues,
    LossTerms,
    chunked_distillation_loss,
    chunked_token_log_probs,
    reference_distillation_loss,
)
from sdft_ds.loss.divergence import Divergence
from tests.helpers.host_syncs import HostSyncs

N, V, D = 13, 37, 8
DIVERGENCES = {
    "forward": Divergence("full_logits", 0.0),
    "jsd": Divergence("full_logits", 0.5, temperature=0.7),
    "reverse": Divergence("full_logits", 1.0),
    "topk": Divergence("topk_logits", 0.5, topk=5),
    "topk_tail": Divergence("topk_logits", 0.0, topk=5, add_tail=True),
    "teacher's topk": Divergence("topk_logits", 0.5, topk=5, support="teacher"),
    "union": Divergence("topk_logits", 0.0, topk=5, support="union"),
    "union_tail": Divergence("topk_logits", 0.5, topk=5, support="union", add_tail=True, temperature=0.7),
    "sampled": Divergence("sampled_token", 1.0),
}


def softcap(logits):
    return torch.tanh(logits / 3.0) * 3.0


def problem(divergence, n=N, bias=False, own_head=True, is_clip=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight = random(n, D).requires_grad_(), random(V, D).requires_grad_()
    bias = random(V).requires_grad_() if bias else None
    terms = LossTerms(
        divergence=divergence,
        teacher_hidden_ND=random(n, D),
        teacher_head=None if own_head else HeadValues(random(V, D), None if bias is None else random(V)),
        tokens_N=torch.randint(V, (n,), generator=generator),
        weights_N=torch.rand(n, generator=generator),
        old_log_probs_N=None if is_clip is None else -torch.rand(n, generator=generator) * 4,
        is_clip=is_clip,
    )
    return hidden, HeadValues(weight, bias), terms


def loss_and_gradients(function, hidden, head, terms, finish, **kwargs):
    for leaf in (hidden, head.weight_VD, head.bias_V):
        if leaf is not None:
            leaf.grad = None
    loss, per_token, *_ = function(hidden, head, terms, torch.tensor(0.25), finish, **kwargs)
    (loss * 3.0).backward()
    return [loss.detach(), per_token, hidden.grad, head.weight_VD.grad] + (
        [] if head.bias_V is None else [head.bias_V.grad]
    )


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
@pytest.mark.parametrize("bias, own_head, is_clip", itertools.product([False, True], [False, True], [None, 1.5]))
def test_equals_the_plain_reference(divergence, bias, own_head, is_clip):
    hidden, head, terms = problem(divergence, bias=bias, own_head=own_head, is_clip=is_clip)
    for finish in (None, softcap):
        expected = loss_and_gradients(reference_distillation_loss, hidden, head, terms, finish)
        for chunk_tokens in (1, 5, N, None):
            got = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, finish, chunk_tokens=chunk_tokens)
            for value, reference in zip(got, expected, strict=True):
                assert (value - reference).norm() <= 5e-6 * reference.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
def test_the_teachers_logits_have_a_factor_of_each_token(divergence):
    hidden, head, terms = problem(divergence, own_head=False)
    terms = replace(terms, teacher_scale_N=torch.linspace(0.5, 3.0, N))
    expected = loss_and_gradients(reference_distillation_loss, hidden, head, terms, softcap)
    plain = loss_and_gradients(
        reference_distillation_loss, hidden, head, replace(terms, teacher_scale_N=None), softcap
    )
    teacher = softcap(terms.teacher_hidden_ND @ terms.teacher_head.weight_VD.T) * terms.teacher_scale_N[:, None]
    by_hand = divergence.per_token(softcap(hidden @ head.weight_VD.T), teacher, terms.tokens_N)
    torch.testing.assert_close(expected[1], by_hand.detach())
    assert not torch.allclose(expected[1], plain[1])
    for chunk_tokens in (1, 5, None):
        got = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, softcap, chunk_tokens=chunk_tokens)
        for value, reference in zip(got, expected, strict=True):
            assert (value - reference).norm() <= 5e-6 * reference.norm()


@pytest.mark.parametrize("name", ["forward", "jsd", "topk", "sampled"])
def test_the_log_probabilities_of_the_tokens_come_with_the_loss(name):
    hidden, head, terms = problem(DIVERGENCES[name])
    assert chunked_distillation_loss(hidden, head, terms, torch.tensor(1.0), None)[2] is None
    for finish in (None, softcap):
        terms = replace(terms, with_log_probs=True)
        got = chunked_distillation_loss(hidden, head, terms, torch.tensor(1.0), finish, chunk_tokens=5)[2]
        temperature = terms.divergence.temperature
        expected = chunked_token_log_probs(hidden.detach(), head, terms.tokens_N, temperature, finish)
        torch.testing.assert_close(got, expected)


def test_without_tokens_a_zero_stays_attached():
    hidden, head, terms = problem(DIVERGENCES["forward"], n=0)
    loss, per_token, _ = chunked_distillation_loss(hidden, head, terms, torch.tensor(1.0), None)
    loss.backward()
    assert loss.item() == 0.0 and per_token.shape == (0,)
    assert hidden.grad.shape == (0, D) and head.weight_VD.grad.abs().sum() == 0


@pytest.mark.parametrize("name", ["forward", "sampled", "topk"])
def test_without_grad_no_gradient_is_computed(monkeypatch, name):
    made = []
    init = chunked._Gradients.__init__
    monkeypatch.setattr(chunked._Gradients, "__init__", lambda self, *args: (init(self, *args), made.append(self))[0])
    hidden, head, terms = problem(DIVERGENCES[name])
    with_grad, *_ = chunked_distillation_loss(hidden, head, terms, torch.tensor(1.0), None)
    with torch.no_grad():
        without, *_ = chunked_distillation_loss(hidden, head, terms, torch.tensor(1.0), None)
    assert torch.equal(without, with_grad.detach()) and not without.requires_grad
    assert made[0].weight is not None and made[1].weight is None and made[1].hidden is None


def test_a_frozen_head_gets_no_gradient():
    hidden, head, terms = problem(DIVERGENCES["forward"])
    frozen = HeadValues(head.weight_VD.detach())
    loss, *_ = chunked_distillation_loss(hidden, frozen, terms, torch.tensor(1.0), None)
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and frozen.weight_VD.grad is None


def test_half_precision_gradients_survive_a_tiny_scale():
    hidden, head, terms = problem(DIVERGENCES["forward"])
    exact = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, None)
    hidden, head, terms = problem(DIVERGENCES["forward"], dtype=torch.bfloat16)
    got = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, None, chunk_tokens=4)
    for value, reference in zip(got[2:4], exact[2:4], strict=True):
        assert (value.float() - reference).norm() / reference.norm() < 0.02


def test_autocast_multiplies_in_its_own_dtype_and_returns_full_precision_gradients():
    hidden, head, terms = problem(DIVERGENCES["jsd"])
    exact = loss_and_gradients(reference_distillation_loss, hidden, head, terms, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, None)
    assert got[2].dtype == got[3].dtype == torch.float32
    for value, reference in zip(got[2:4], exact[2:4], strict=True):
        assert (value - reference).norm() / reference.norm() < 0.05


def test_token_log_probs():
    hidden, head, terms = problem(DIVERGENCES["forward"])
    expected = (hidden @ head.weight_VD.T / 0.5).log_softmax(-1).gather(-1, terms.tokens_N[:, None])[:, 0]
    got = chunked_token_log_probs(hidden, head, terms.tokens_N, 0.5, None, chunk_tokens=4)
    torch.testing.assert_close(got, expected.detach())


def test_chunks_are_larger_on_a_gpu():
    vocabulary = 152_064
    sizes = [
        chunked.chunks_of(10_000, vocabulary, torch.device(device))[0].stop for device in ("cpu", "cuda", "cuda:1")
    ]
    assert sizes == [55, 441, 441]
    assert chunked.chunks_of(10_000, vocabulary, torch.device("cuda"), chunk_tokens=7)[0] == slice(0, 7)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys())
@pytest.mark.parametrize("is_clip", [None, 1.5])
def test_the_host_never_waits_for_a_chunk(divergence, is_clip):
    hidden, head, terms = problem(divergence, is_clip=is_clip)
    terms, scale = replace(terms, with_log_probs=True), torch.tensor(1.0)
    with HostSyncs() as syncs:
        for finish in (None, softcap):
            loss, *_ = chunked_distillation_loss(hidden, head, terms, scale, finish, chunk_tokens=2)
            loss.backward()
    assert not syncs.found


@pytest.mark.parametrize(
    "device, dtype, expected",
    [
        ("cuda", torch.bfloat16, True),
        ("cuda", torch.float16, True),
        ("cuda", torch.float32, False),
        ("cpu", torch.bfloat16, False),
    ],
)
def test_which_products_are_returned_in_fp32(device, dtype, expected):
    assert chunked.has_fp32_products(device, dtype) == expected


def test_half_precision_operands_are_multiplied_plainly_on_a_cpu(monkeypatch):
    for name in ("mm", "bmm", "addmm"):
        monkeypatch.setattr(torch, name, None)
    hidden, head, terms = problem(DIVERGENCES["forward"], dtype=torch.bfloat16, bias=True)
    loss_and_gradients(chunked_distillation_loss, hidden, head, terms, None)


class _AsOnCuda:
    """torch's products with out_dtype, which a CPU does not have."""

    @staticmethod
    def product(a, b, *, out_dtype=None):
        if out_dtype is None:
            return a @ b
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return a.float() @ b.float()

    @staticmethod
    def addmm(added, a, b, *, out_dtype, out):
        assert added is out and out.dtype == torch.float32
        return out.add_(_AsOnCuda.product(a, b, out_dtype=out_dtype))


@pytest.mark.parametrize("name", ["forward", "jsd", "topk", "union_tail"])
@pytest.mark.parametrize("bias, own_head, adapted", [(False, True, False), (True, False, False), (True, False, True)])
def test_with_fp32_products_logits_and_the_heads_gradient_are_not_rounded(monkeypatch, name, bias, own_head, adapted):
    hidden, head, terms = problem(DIVERGENCES[name], bias=bias, own_head=own_head, dtype=torch.bfloat16)
    if adapted:
        # It picks two hidden elements: rounded on the way, as in PEFT, they could change which tokens are the top-k.
        down = torch.eye(2, D).bfloat16()
        up = torch.randn(V, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
        head = replace(head, adapter=Adapter(down, up, 0.5))

    def exactly(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    def exact(values):
        adapter = values.adapter and Adapter(exactly(values.adapter.down_QD), exactly(values.adapter.up_VQ), 0.5)
        return HeadValues(exactly(values.weight_VD), exactly(values.bias_V), adapter)

    exact_terms = replace(
        terms,
        teacher_hidden_ND=terms.teacher_hidden_ND.double(),
        teacher_head=None if own_head else exact(terms.teacher_head),
    )
    expected = loss_and_gradients(reference_distillation_loss, exactly(hidden), exact(head), exact_terms, None)

    def errors():
        got = loss_and_gradients(chunked_distillation_loss, hidden, head, terms, None, chunk_tokens=4)
        return [
            float((value - true).norm() / true.norm()) for value, true in zip(got[1::2], expected[1::2], strict=True)
        ]

    rounded = errors()
    monkeypatch.setattr(chunked, "has_fp32_products", lambda device_type, dtype: dtype == torch.bfloat16)
    for each in ("mm", "bmm"):
        monkeypatch.setattr(torch, each, _AsOnCuda.product)
    monkeypatch.setattr(torch, "addmm", _AsOnCuda.addmm)
    in_fp32 = errors()
    assert in_fp32[0] < rounded[0] and in_fp32[0] < 1e-6
    assert in_fp32[1] < rounded[1] * 1.1


def test_this_torch_has_the_fp32_products():
    """Their signatures, on the meta device; only CUDA computes them."""
    a, b, total = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (
        ((2, 3, 4), torch.bfloat16), ((2, 4, 5), torch.bfloat16), ((3, 5), torch.float32)
    ))  # fmt: skip
    assert torch.bmm(a, b, out_dtype=torch.float32).dtype == torch.mm(a[0], b[0], out_dtype=torch.float32).dtype
    assert torch.addmm(total, a[0], b[0], out_dtype=torch.float32, out=total) is total
