"""N steps are k steps, a resume, and N - k: bit by bit, wherever in a generation batch and from whatever data."""

import pytest

from sdft_ds import SFTConfig
from tests.distributed.scenarios.checkpoints import exports, resume
from tests.helpers.cases import covering

STAGES = [None, 0, 1, 2, 3]
# Four micro-batches of one generation batch, one for each step: step 3 is inside it.
INSIDE = {"steps_per_generation": 2, "num_iterations": 2}


def assert_exact(results):
    for rank in results:
        whole, first, resumed = rank["whole"], rank["first"], rank["resumed"]
        assert first["losses"] == whole["losses"][:3] and len(set(whole["rates"])) > 3
        for what in ("losses", "rates"):
            assert resumed[what] == whole[what][3:], what
        assert resumed["completions"] == whole["completions"][-len(resumed["completions"]) :]
        assert resumed["weights"] == whole["weights"] and resumed["teacher"] == whole["teacher"]
        assert resumed["start"] == {what: first[what] for what in ("weights", "teacher")}


KINDS = [("ema", False), ("ema", True), ("base", False), ("base", True)]
# Each stage with every kind with --full; the fast set has a few stages, inside a batch and between two.
FAST_STAGES = (2, 3)
CASES = [
    pytest.param(
        stage, kind, lora, inside, marks=[] if (i + s) % 4 == 2 * inside and stage in FAST_STAGES else pytest.mark.full
    )
    for s, stage in enumerate(STAGES)
    for i, (kind, lora) in enumerate(KINDS)
    for inside in (False, True)
]


@pytest.mark.parametrize("stage, kind, lora, inside", CASES)
def test_a_resumed_run_is_the_run_that_was_interrupted(two_ranks, tmp_path, stage, kind, lora, inside):
    settings = INSIDE if inside else {}
    results = two_ranks.run(resume, stage, str(tmp_path), teacher_model_kind=kind, lora=lora, **settings)
    assert_exact(results)
    # Inside a generation batch the resumed run makes the second one only.
    assert len(results[0]["resumed"]["completions"]) == (1 if inside else 2)


@pytest.mark.parametrize(
    "settings",
    [INSIDE, *(pytest.param(each, marks=pytest.mark.full) for each in ({}, {"gradient_accumulation_steps": 2}))],
)
def test_a_stream_goes_on_with_the_rows_that_follow(two_ranks, tmp_path, settings):
    assert_exact(two_ranks.run(resume, 2, str(tmp_path), teacher_model_kind="base", stream=True, **settings))


def test_a_half_used_batch_of_bf16_states_and_an_adapted_head(two_ranks, tmp_path):
    assert_exact(
        two_ranks.run(resume, 3, str(tmp_path), teacher_model_kind="ema", lora="on the head", bf16=True, **INSIDE)
    )


@pytest.mark.full
def test_continuous_batching_inside_a_generation_batch(two_ranks, tmp_path):
    assert_exact(two_ranks.run(resume, 2, str(tmp_path), rollout_backend="continuous", **INSIDE))


@pytest.mark.parametrize("stage, lora", covering([1, 2, 3], [False, True]))
def test_the_teacher_and_the_fp32_weights_can_be_exported(two_ranks, tmp_path, stage, lora):
    for rank in two_ranks.run(exports, stage, str(tmp_path), lora=lora):
        assert rank["teacher"] < 1e-4 and rank["fp32"] == 0.0


@pytest.mark.parametrize(
    "stage, lora, settings",
    [(2, False, {"gradient_accumulation_steps": 2}), pytest.param(3, True, {}, marks=pytest.mark.full)],
)
def test_supervised_fine_tuning(two_ranks, tmp_path, stage, lora, settings):
    assert_exact(two_ranks.run(resume, stage, str(tmp_path), config=SFTConfig, lora=lora, **settings))
