"""A loss that is not a number on one rank: seen, counted, and without a trace in weights and teacher."""

import pytest

from tests.distributed.scenarios import bad_numbers

REPEATS = [pytest.param(*each, marks=pytest.mark.full) for each in ((0, True), (1, False), (3, True))]


@pytest.mark.parametrize("stage, bf16", [(None, False), (0, False), (2, True), (3, False), *REPEATS])
def test_a_step_with_a_bad_gradient_is_left_out(two_ranks, stage, bf16):
    for rank in two_ranks.run(bad_numbers.one_bad_step, stage, [2], bf16=bf16):
        weights, teachers = zip(*rank["after"], strict=True)
        assert weights[1] == weights[0] and teachers[1] == teachers[0]
        assert len(set(weights)) == len(set(teachers)) == 3  # the other steps were made
        assert rank["bad"] == [0, 1, 0, 0]
        assert [loss != loss for loss in rank["losses"]] == [False, True, False, False]  # shown as it is


@pytest.mark.parametrize("stage", [None, pytest.param(3, marks=pytest.mark.full)])
def test_too_many_in_a_row_end_the_run(two_ranks, stage):
    with pytest.raises(AssertionError, match="not finite in 2 optimizer steps in a row, up to step 3"):
        two_ranks.run(bad_numbers.one_bad_step, stage, [2, 3], max_nonfinite_steps=2)
