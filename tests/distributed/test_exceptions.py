"""An exception in a rollout, in a teacher's pass or half-way through a swap: everything is as before, and training
goes on as if nothing had been."""

import pytest

from tests.distributed.scenarios import exceptions

EMA = {"teacher_model_kind": "ema", "teacher_sync_steps": 1}


@pytest.mark.parametrize(
    "stage, settings",
    [
        (None, EMA),
        (2, EMA),
        (3, EMA),
        pytest.param(0, {**EMA, "bf16": True}, marks=pytest.mark.full),
        pytest.param(1, {**EMA, "bf16": True}, marks=pytest.mark.full),
        pytest.param(3, {**EMA, "ds3_gather_for_generation": False}, marks=pytest.mark.full),
        pytest.param(3, {"teacher_model_kind": "base", "lora": True}, marks=pytest.mark.full),
    ],
)
def test_an_exception_leaves_nothing_behind(two_ranks, stage, settings):
    stumbled = two_ranks.run(exceptions.train_with_exceptions, stage, True, timeout=60, **settings)
    assert stumbled == two_ranks.run(exceptions.train_with_exceptions, stage, False, timeout=60, **settings)


def test_a_shard_lies_where_its_own_group_has_it(two_ranks):
    """Parameters that DeepSpeed shards over fewer ranks than there are."""
    for pieces in two_ranks.run(exceptions.offsets_in_a_group_of_one, timeout=60):
        assert pieces and all(offset == 0 and held == whole for offset, held, whole in pieces)
