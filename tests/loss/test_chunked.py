import itertools
from dataclasses import replace

import pytest
import torch

from sdft_ds.loss.chunked import (
    HeadValues,
    LossTerms,
    chunked_distillation_loss,
    chunked_token_log_probs,
    reference_distillation_loss,
)
from sdft_ds.loss.divergence import Divergence

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
