import math

import pytest
import torch

from sdft_ds.loss.divergence import Divergence, importance_weight, kl, sampled_token_surrogate, token_log_probs
from tests.helpers import reference

# Two distributions over three tokens whose divergences fit on paper.
S, T = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def random_pair(n=6, v=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(n, v, generator=generator, dtype=torch.float64) * 3  # noqa: E731
    return make(), make(), torch.randint(v, (n,), generator=generator)


def per_token(mode, alpha, **settings):
    return lambda s, t, tokens: Divergence(mode, alpha, **settings).per_token(s, t, tokens)


def test_by_hand():
    tokens = torch.tensor([0])
    log2 = math.log(2)
    # forward: .25 log(.25/.5) + .5 log(.5/.25) = .25 log 2; here the reverse is the same by symmetry
    assert per_token("full_logits", 0.0)(logits(S), logits(T), tokens).item() == pytest.approx(0.25 * log2)
    assert per_token("full_logits", 1.0)(logits(S), logits(T), tokens).item() == pytest.approx(0.25 * log2)
    # m = (.375, .375, .25): KL(s||m) = .5 log(4/3) + .25 log(2/3), and KL(t||m) is equal
    jsd = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)
    assert per_token("full_logits", 0.5)(logits(S), logits(T), tokens).item() == pytest.approx(jsd)


def test_forward_and_reverse_are_not_swapped():
    s, t = logits([0.9, 0.1]), logits([0.5, 0.5])
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    tokens = torch.tensor([0])
    assert per_token("full_logits", 0.0)(s, t, tokens).item() == pytest.approx(forward)
    assert per_token("full_logits", 1.0)(s, t, tokens).item() == pytest.approx(reverse)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9])
def test_jsd_weights_follow_the_formula(alpha):
    s, t, tokens = random_pair()
    p, q = s.softmax(-1), t.softmax(-1)
    m = (1 - alpha) * p + alpha * q
    expected = ((1 - alpha) * (p * (p / m).log()) + alpha * (q * (q / m).log())).sum(-1)
    torch.testing.assert_close(per_token("full_logits", alpha)(s, t, tokens), expected)


def test_topk_by_hand():
    # The student's two largest are tokens 0 and 1. Renormalised: s = (2/3, 1/3), t = (1/3, 2/3).
    s, t, tokens = logits([0.5, 0.3, 0.2]), logits([0.2, 0.3, 0.5]), torch.tensor([0])
    s2, t2 = torch.tensor([5 / 8, 3 / 8]), torch.tensor([2 / 5, 3 / 5])
    expected = (t2 * (t2 / s2).log()).sum().item()
    assert per_token("topk_logits", 0.0, topk=2)(s, t, tokens).item() == pytest.approx(expected)
    s3, t3 = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    tail = (t3 * (t3 / s3).log()).sum().item()
    assert per_token("topk_logits", 0.0, topk=2, add_tail=True)(s, t, tokens).item() == pytest.approx(tail)


MODES = [
    ("full_logits", {}),
    ("topk_logits", {"topk": 4}),
    ("topk_logits", {"topk": 4, "add_tail": True}),
    ("topk_logits", {"topk": 3, "support": "teacher"}),
    ("topk_logits", {"topk": 3, "support": "union"}),
    ("topk_logits", {"topk": 3, "support": "union", "add_tail": True}),
    ("topk_logits", {"topk": 5, "support": "union", "add_tail": True}),
]


@pytest.mark.parametrize("support", ["teacher", "union"])
@pytest.mark.parametrize("add_tail", [False, True])
@pytest.mark.parametrize("topk", [1, 3, 6, 10])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_support_equals_the_plain_reference(support, add_tail, topk, alpha):
    """Also where the two sides overlap, and where they make up the vocabulary of 11 together."""
    s, t, tokens = random_pair()
    plain = reference.per_token(s, t, alpha, topk, add_tail, support)
    got = per_token("topk_logits", alpha, topk=topk, add_tail=add_tail, support=support)(s, t, tokens)
    torch.testing.assert_close(got, plain)


def test_a_token_that_only_the_teacher_wants_gets_its_gradient():
    """A new fact: the student holds token 3 unlikely, the teacher is sure of it."""
    s, t, tokens = logits([0.6, 0.3, 0.08, 0.02]), logits([0.05, 0.04, 0.01, 0.9]), torch.tensor([0])
    for support, add_tail, learns in (
        ("student", False, False), ("student", True, True), ("teacher", True, True), ("union", False, True),
    ):  # fmt: skip
        leaf = s.clone().requires_grad_()
        per_token("topk_logits", 0.0, topk=2, add_tail=add_tail, support=support)(leaf, t, tokens).sum().backward()
        assert (leaf.grad[0, 3] < 0) == learns, support
        if support == "student" and add_tail:  # as a part of the rest, together with all of it
            assert leaf.grad[0, 2] < 0
        elif learns:
            assert leaf.grad[0, 3] < leaf.grad[0, :3].min()


@pytest.mark.parametrize("mode, settings", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_zero_for_equal_sides_and_never_negative(mode, settings, alpha):
    s, t, tokens = random_pair(n=200)
    divergence = per_token(mode, alpha, **settings)
    torch.testing.assert_close(divergence(s, s.clone(), tokens), torch.zeros(200, dtype=torch.float64))
    assert (divergence(s, t, tokens) >= 0).all()
    assert (divergence(s.float(), t.float(), tokens) >= -1e-6).all()


@pytest.mark.parametrize("k", [11, 50])
@pytest.mark.parametrize("add_tail", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_topk_of_the_whole_vocabulary_is_full(k, add_tail, alpha):
    s, t, tokens = random_pair()
    full = per_token("full_logits", alpha)(s, t, tokens)
    torch.testing.assert_close(per_token("topk_logits", alpha, topk=k, add_tail=add_tail)(s, t, tokens), full)


@pytest.mark.parametrize("mode, settings", MODES)
def test_temperature_divides_both_sides(mode, settings):
    s, t, tokens = random_pair()
    warm = per_token(mode, 0.5, temperature=2.0, **settings)(s, t, tokens)
    torch.testing.assert_close(warm, per_token(mode, 0.5, **settings)(s / 2, t / 2, tokens))


@pytest.mark.parametrize("mode, settings", MODES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradient_reaches_the_student_only_and_is_right(mode, settings, alpha):
    s, t, tokens = random_pair(n=3, v=7)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: per_token(mode, alpha, **settings)(x, t, tokens), (s,))


def test_tail_keeps_digits_when_the_topk_hold_nearly_all_mass():
    s = torch.tensor([[30.0, 0.0, -1.0, -2.0]], requires_grad=True)
    t = torch.tensor([[30.0, -1.0, 0.0, -2.0]])
    loss = per_token("topk_logits", 0.0, topk=1, add_tail=True)(s, t, torch.tensor([0]))
    exact = per_token("topk_logits", 0.0, topk=1, add_tail=True)(s.double(), t.double(), torch.tensor([0]))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-12)
    loss.sum().backward()
    assert s.grad.isfinite().all()


def test_impossible_tokens_of_the_teacher_add_nothing():
    s, t = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, float("-inf")]])
    s.requires_grad_()
    loss = per_token("full_logits", 0.0)(s, t, torch.tensor([0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(1.5)) and s.grad.isfinite().all()


def test_sampled_token_gradient_is_the_reverse_kl_in_expectation():
    s, t, _ = random_pair(n=1, v=6)
    exact = s.clone().requires_grad_()
    kl(exact.log_softmax(-1), t.log_softmax(-1)).sum().backward()
    surrogate = s.clone().requires_grad_()
    every = torch.arange(6)
    student = token_log_probs(surrogate.expand(6, 6), every)
    teacher = token_log_probs(t.expand(6, 6), every)
    # The expectation over the student's own samples, written out over all six of them.
    (s.softmax(-1)[0] * sampled_token_surrogate(student, teacher)).sum().backward()
    torch.testing.assert_close(surrogate.grad, exact.grad)


def test_importance_weight_is_clipped_from_above_and_detached():
    s = torch.tensor([-1.0, -1.0, -5.0], requires_grad=True)
    weight = importance_weight(s, torch.tensor([-1.0, -3.0, -1.0]), clip=2.0)
    torch.testing.assert_close(weight, torch.tensor([1.0, 2.0, math.exp(-4.0)]))
    assert not weight.requires_grad
