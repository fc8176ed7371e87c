"""What both sides think, against plain whole logits; and what the metrics make of it."""

import math

import pytest
import torch

from sdft_ds.loss import chunked
from sdft_ds.loss.chunked import HeadValues, LossTerms
from sdft_ds.loss.diagnostics import evenly_spaced, token_diagnostics
from sdft_ds.loss.divergence import Divergence
from sdft_ds.metrics.meters import Meters

N, V, D, K = 11, 40, 8, 6


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    hidden, teacher, weight, other = (torch.randn(n, D, generator=generator) for n in (N, N, V, V))
    terms = LossTerms(
        Divergence("topk_logits", 0.5, topk=K, temperature=0.7), teacher, HeadValues(other),
        torch.arange(N) % V, torch.ones(N), teacher_scale_N=torch.linspace(0.5, 2.0, N),
    )  # fmt: skip
    student_p = (hidden @ weight.T / 0.7).softmax(-1)
    teacher_p = (teacher @ other.T * terms.teacher_scale_N[:, None] / 0.7).softmax(-1)
    return hidden, HeadValues(weight), terms, student_p, teacher_p


@pytest.mark.parametrize("elements", [1 << 23, 3 * V])
def test_both_sides_are_those_of_whole_distributions(case, monkeypatch, elements):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)  # one chunk, or several
    hidden, head, terms, student_p, teacher_p = case
    at = torch.tensor([0, 3, 4, 7, 10])
    seen = token_diagnostics(hidden, head, terms, None, at)
    support = student_p.topk(K, dim=-1).indices
    for side, p in ((seen.student, student_p), (seen.teacher, teacher_p)):
        torch.testing.assert_close(side.entropy_M, -(p * p.log()).sum(-1)[at])
        torch.testing.assert_close(side.probabilities_M5, p[at].sort(descending=True).values[:, :5])
        torch.testing.assert_close(side.mass_M, p.gather(-1, support).sum(-1)[at])
    assert seen.agree_M.tolist() == (student_p.argmax(-1) == teacher_p.argmax(-1))[at].tolist()
    torch.testing.assert_close(seen.log_prob_M, student_p.log()[at, terms.tokens_N[at]])
    assert len(seen[2:]) == 3 and torch.equal(seen[2:].teacher.entropy_M, seen.teacher.entropy_M[2:])


def test_no_tokens(case):
    hidden, head, terms, *_ = case
    assert len(token_diagnostics(hidden, head, terms, None, torch.tensor([], dtype=torch.long))) == 0


def test_evenly_spaced_tokens():
    assert evenly_spaced(3, 5, "cpu").tolist() == [0, 1, 2]
    assert evenly_spaced(9, 3, "cpu").tolist() == [0, 4, 8] and len(evenly_spaced(9, 0, "cpu")) == 0


def collected(parts, ranks):
    """What `ranks` meters say of the parts of the tokens dealt to them."""
    meters = [Meters(None, torch.device("cpu"), rank=r, ranks=ranks) for r in range(ranks)]
    for part, meter in zip(parts, meters, strict=True):
        meter.add_divergences(*part)
    columns: list = [[] for _ in meters]

    def joined(r):
        def reduce(tensor, how):
            columns[r].append(tensor)
            return tensor

        return reduce

    for r, meter in enumerate(meters):  # what each gives to its reductions, in their order
        meter.reduce = joined(r)
        histogram, sums = meter.histogram.clone(), {k: list(v) for k, v in meter.sums.items()}
        meter.collect(1)
        meter.histogram, meter.sums = histogram, sums
    whole = iter([torch.stack(c).sum(0) for c in zip(*columns, strict=True)])
    most = iter([torch.stack(c).amax(0) for c in zip(*columns, strict=True)])
    meters[0].reduce = lambda tensor, how: (next(whole), next(most))[how == "max"]
    return meters[0].collect(1)


def test_two_ranks_say_what_one_does():
    """Means by position and quantiles, of 1,000 tokens in one part or in two."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator).pow(4)
    offsets = torch.randint(0, 400, (1000,), generator=generator)
    one = collected([(values, offsets)], 1)
    two = collected([(values[:300], offsets[:300]), (values[300:], offsets[300:])], 2)
    for name in one:
        if name.startswith(("divergence", "sdft", "completions")):
            assert two[name] == pytest.approx(one[name], rel=1e-6), name
    bucket = values[(offsets >= 16) & (offsets < 64)]
    assert one["divergence/position_16_64"] == pytest.approx(bucket.mean().item(), rel=1e-5)
    assert one["divergence/position_256_up"] == pytest.approx(values[offsets >= 256].mean().item(), rel=1e-5)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert one[f"divergence/{name}"] == pytest.approx(values.quantile(share).item(), rel=0.06)


def test_divergences_that_are_not_numbers_are_the_largest():
    meters = Meters(lambda tensor, how: tensor, torch.device("cpu"))
    meters.add_divergences(torch.tensor([math.nan, math.inf, 1e-9, 0.0]), torch.arange(4))
    values = meters.collect(1)
    assert values["divergence/p50"] < 1e-6 and values["divergence/p99"] > 90
    assert math.isnan(values["sdft/distillation_loss"])


def test_a_rank_that_the_others_wait_for_is_named():
    """The first phase in which it takes longer; in the next one the others wait."""
    other = {"sum": lambda t: t * 4, "max": lambda t: t}
    meters = Meters(lambda tensor, how: tensor * 1.2 if how == "sum" else tensor, torch.device("cpu"), rank=3, ranks=4)
    meters.add("seconds/rollout", 9.0)
    meters.add("seconds/teacher", 1.0)
    meters.since -= 10
    meters.collect(1)
    assert meters.straggler == "rank 3 took 9 s in rollout, others 0.6 s"
    meters.reduce = lambda tensor, how: other[how](tensor)
    meters.add("seconds/rollout", 9.0)
    meters.since -= 10
    meters.collect(1)
    assert meters.straggler is None
