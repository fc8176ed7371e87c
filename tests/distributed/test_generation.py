"""Rollouts under ZeRO-3, gathered and layer by layer: the first thing in a run and later, and after a fault; and what
of DeepSpeed runs for each token."""

import itertools

import pytest

from tests.distributed.scenarios import generation
from tests.helpers.trainers import train

# Layer by layer, as all ranks have to go on together; with --full gathered as well.
GATHER = pytest.mark.parametrize("gather", [pytest.param(True, marks=pytest.mark.full), False])
# Each value of each once: with --full in every combination.
FAST = [(True, False, True), (False, True, False)]


@pytest.mark.parametrize(
    "gather, warm, lora",
    [
        pytest.param(*each, marks=[] if each in FAST else pytest.mark.full)
        for each in itertools.product([True, False], repeat=3)
    ],
)
def test_same_completions_as_without_deepspeed(two_ranks, gather, warm, lora):
    expected = generation.generate(None, True, warm=warm, lora=lora, per_device_train_batch_size=4)
    for got in two_ranks.run(generation.generate, 3, gather, warm=warm, lora=lora, timeout=120):
        assert got == expected


@GATHER
def test_ranks_whose_rollouts_differ_in_length_do_not_hang(two_ranks, gather):
    """Nor with other lengths from one look for finished rows to the next, as on a GPU."""
    found = [
        two_ranks.run(generation.generate, 3, gather, uneven=True, look_every=every, timeout=120) for every in (1, 3)
    ]
    lengths = [max(len(ids) for ids in completions[0]) for completions in found[0]]
    assert lengths[0] <= 4 < lengths[1] <= 8
    assert found[0] == found[1]


@pytest.mark.parametrize("gather", [False, pytest.param(True, marks=pytest.mark.full)])
def test_ranks_with_unlike_numbers_of_rows_make_calls_that_fit(two_ranks, gather):
    """As many on both where all ranks go on together; and what is sampled depends on neither."""
    expected, calls = generation.in_calls_that_fit(None, True)
    assert calls == [6]
    (one, few), (five, many) = two_ranks.run(generation.in_calls_that_fit, 3, gather, 80, timeout=120)
    assert one + five == expected
    assert many == [2, 3] and few == ([1] if gather else [1, 1])


@pytest.mark.parametrize("gather", [True, pytest.param(False, marks=pytest.mark.full)])
def test_train_evaluate_train(two_ranks, gather):
    expected = two_ranks.run(generation.train_evaluate_train, None, True)[0]
    for got in two_ranks.run(generation.train_evaluate_train, 3, gather, timeout=120):
        assert got == pytest.approx(expected, rel=1e-5)


@GATHER
def test_an_exception_inside_leaves_everything_as_it_was(two_ranks, gather):
    expected = two_ranks.run(train, 3, timeout=120)[0]["losses"]
    for got in two_ranks.run(generation.exception_inside_generation, 3, gather, timeout=120):
        assert got == expected


@pytest.mark.parametrize("settings", [{}, pytest.param({"lora": True, "bf16": True}, marks=pytest.mark.full)])
def test_none_of_deepspeeds_code_runs_for_a_token_while_weights_are_gathered(two_ranks, settings):
    for calls in two_ranks.run(generation.calls_per_token, 3, True, **settings):
        assert calls == {"deepspeed": 0, "autograd functions": 0}
    for calls in two_ranks.run(generation.calls_per_token, 3, False, **settings):
        assert min(calls.values()) > 10  # what would have been counted


@pytest.mark.parametrize("nested", [0, 1])
def test_hooks_are_back_in_their_order_after_a_rollout(one_rank, nested):
    one_rank.run(generation.hooks_while_gathered, nested)
