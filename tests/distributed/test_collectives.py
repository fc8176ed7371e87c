"""What the teacher costs in communication at ZeRO-3, counted on the calls themselves."""

import pytest

from tests.distributed.scenarios.communication import gathers, ranks_without_loss
from tests.helpers.trainers import train

THREE_STEPS = {"max_steps": 3, "gradient_accumulation_steps": 2}
KINDS = pytest.mark.parametrize(
    "kind, lora",
    [
        pytest.param("base", False, marks=pytest.mark.full),
        pytest.param("ema", False, marks=pytest.mark.full),
        ("base", True),
    ],
)


@pytest.fixture(scope="module")
def student(two_ranks):
    """What a run with a live teacher gathers, with an adapter or without."""
    made = {}

    def get(lora):
        if lora not in made:
            made[lora] = two_ranks.run(gathers, 3, teacher_model_kind="live", lora=lora, **THREE_STEPS)[0]
        return made[lora]

    return get


@KINDS
def test_teacher_and_student_gather_at_most_twice_what_the_student_does(two_ranks, student, kind, lora):
    both = two_ranks.run(gathers, 3, teacher_model_kind=kind, lora=lora, **THREE_STEPS)[0]
    for run in (both, student(lora)):
        assert run["trace is complete"] and run["teacher's trace is complete"]
        assert 0 < run["student"] + run["teacher"] <= 2 * student(lora)["student"]


@pytest.mark.full
def test_the_teachers_gathers_follow_its_own_batches(two_ranks):
    """Eight rows in one scoring batch or in four, whatever the student's accumulation is."""
    one = two_ranks.run(gathers, 3, teacher_model_kind="base", per_device_train_batch_size=4, max_steps=3)[0]
    four = two_ranks.run(
        gathers,
        3,
        teacher_model_kind="base",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=3,
    )[0]
    per_batch = one["teacher"]
    assert per_batch <= four["teacher"] <= 4 * per_batch


@pytest.mark.parametrize("stage", [pytest.param(None, marks=pytest.mark.full), 2, 3])
def test_rows_without_loss_on_one_rank_or_on_all_do_not_hang(two_ranks, stage):
    """Every completion shorter than what is skipped: zeros that stay attached, on one rank and on both."""
    for rank in two_ranks.run(ranks_without_loss, stage, [0, 1]):
        assert rank["losses"] == [0.0, 0.0, 0.0]
    lost = two_ranks.run(ranks_without_loss, stage, [0])
    assert lost[0]["tokens"] == 0 < lost[1]["tokens"] and lost[0]["losses"] == lost[1]["losses"]


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.full)])
def test_fewer_rows_than_a_generation_batch_do_not_hang(two_ranks, rows):
    for rank in two_ranks.run(train, 3, rows=rows, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1):
        assert len(rank["losses"]) == 2
