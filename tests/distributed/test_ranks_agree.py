"""Two ranks, at any ZeRO stage and accumulation, do what one process does on the same global batch."""

import pytest
import torch

from tests.distributed.scenarios.uneven_ranks import train_on_rows_of_unlike_length
from tests.helpers.cases import covering
from tests.helpers.trainers import evaluate, train

# One process with 4 rows a micro-batch; two ranks have 2 each.
ONE = {"per_device_train_batch_size": 4}


def assert_same(got, expected, tolerance=2e-6):
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=tolerance, atol=1e-7)
    if got["grad_norms"][0] is not None:  # DeepSpeed reports none at stage 0
        torch.testing.assert_close(got["grad_norms"], expected["grad_norms"], rtol=1e-5, atol=1e-7)
    for log, wanted in zip(got["logs"], expected["logs"], strict=True):
        for name in ("completions/mean_length", "completions/max_length", "completions/loss_tokens"):
            assert log[name] == wanted[name], name
        assert log["sdft/distillation_loss"] == pytest.approx(wanted["sdft/distillation_loss"], rel=1e-5)
    for name, weight in expected["weights"].items():
        assert (got["weights"][name] - weight).norm() <= 2e-5 * weight.norm().clamp(min=1e-3), name


@pytest.fixture(scope="module")
def alone():
    """What one plain process does, for each (lora, accumulation)."""
    made = {}

    def get(lora, accumulation):
        key = (lora, accumulation)
        if key not in made:
            made[key] = train(lora=lora, gradient_accumulation_steps=accumulation, **ONE)
        return made[key]

    return get


@pytest.mark.parametrize("stage, accumulation, lora", covering([None, 0, 1, 2, 3], [1, 2, 4], [False, True]))
def test_two_ranks_equal_one_process(two_ranks, alone, stage, accumulation, lora):
    expected = alone(lora, accumulation)
    for got in two_ranks.run(train, stage, lora=lora, gradient_accumulation_steps=accumulation):
        assert_same(got, expected)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_the_accumulation_does_not_change_the_step(loss_type):
    rows = {"loss_type": loss_type, "num_loss_tokens_to_skip": 2, "optim": "sgd"}
    whole = train(per_device_train_batch_size=8, **rows)
    for accumulation in (2, 4):
        parts = train(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, **rows)
        assert_same(parts, whole)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_evaluation_before_training(two_ranks, stage):
    expected = evaluate(per_device_eval_batch_size=4, num_generations_eval=2)
    got = two_ranks.run(evaluate, stage, per_device_eval_batch_size=2, num_generations_eval=2)
    assert got[0] == got[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_teachers_batches_are_other_on_each_rank(two_ranks, unlike, stage):
    """Rows of which some have long contexts, and a budget of tokens: one rank needs more batches than the other."""
    got = two_ranks.run(
        train_on_rows_of_unlike_length, stage, timeout=60,
        per_device_train_batch_size=4, scoring_batch_tokens=400,
    )  # fmt: skip
    assert all(one != other for one, other in zip(got[0]["alone"], got[1]["alone"], strict=True))
    for rank in got:
        assert_same(rank, unlike)


@pytest.fixture(scope="module")
def unlike():
    return train_on_rows_of_unlike_length(per_device_train_batch_size=8)


@pytest.mark.full
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_continuous_batching_on_two_ranks(two_ranks, stage):
    """ZeRO-3's weights are gathered for it; greedy, its completions are those of the other backend."""
    settings = {"generation_kwargs": {"do_sample": False}}
    expected = train(**settings, **ONE)
    for got in two_ranks.run(train, stage, rollout_backend="continuous", **settings):
        assert_same(got, expected, tolerance=1e-5)
