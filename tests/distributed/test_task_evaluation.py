"""Questions during training on two ranks: the figures of one process, and the training of a run without questions."""

import json
from pathlib import Path

import pytest

from tests.distributed.scenarios import task_evaluation

WAYS = [
    (2, {}),
    (3, {}),
    pytest.param(3, {"ds3_gather_for_generation": False}, marks=pytest.mark.full),
    pytest.param(3, {"lora": "on the head"}, marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one plain process writes, for each adapter."""
    made = {}

    def get(lora):
        if lora not in made:
            folder = str(tmp_path_factory.mktemp("alone"))
            made[lora] = task_evaluation.examined(None, folder, lora=lora, per_device_train_batch_size=4), folder
        return made[lora]

    return get


@pytest.fixture(scope="module")
def asked(two_ranks, tmp_path_factory):
    """What two ranks come to, and write, for each way."""
    made = {}

    def get(stage, settings):
        key = repr((stage, settings))
        if key not in made:
            folder = tmp_path_factory.mktemp("asked")
            made[key] = two_ranks.run(task_evaluation.examined, stage, str(folder), **settings), folder
        return made[key]

    return get


@pytest.mark.parametrize("stage, settings", [pytest.param(None, {}, marks=pytest.mark.full), *WAYS])
def test_the_figures_of_one_process(asked, alone, stage, settings):
    expected, folder = alone(settings.get("lora", False))
    results, written = asked(stage, settings)
    for got in results:
        for log, wanted in zip(got["logged"], expected["logged"], strict=True):
            assert log == pytest.approx(wanted, rel=2e-4)
    for step in (0, 2, 4):
        for name in ("vowels", "retention"):
            answers = f"evaluations/{name}-step-{step}.jsonl"
            assert Path(written, answers).read_text() == Path(folder, answers).read_text()
    lines = [json.loads(text) for text in (written / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["task"]) for line in lines] == [
        (step, name) for step in (0, 2, 4) for name in ("vowels", "retention")
    ]


@pytest.mark.parametrize("stage, settings", [pytest.param(2, {}, marks=pytest.mark.full), *WAYS[1:]])
def test_training_is_bit_by_bit_that_without_questions(two_ranks, asked, tmp_path, stage, settings):
    plain = two_ranks.run(task_evaluation.examined, stage, str(tmp_path), tasks=False, **settings)
    for with_questions, without in zip(asked(stage, settings)[0], plain, strict=True):
        for what in ("losses", "completions", "weights", "random"):
            assert with_questions[what] == without[what], what


@pytest.mark.parametrize(
    "stage, settings",
    [
        (3, {"teacher_model_kind": "base"}),
        pytest.param(2, {"teacher_model_kind": "ema"}, marks=pytest.mark.full),
        pytest.param(3, {"lora": True, "teacher_model_kind": "base"}, marks=pytest.mark.full),
        pytest.param(3, {"ds3_gather_for_generation": False}, marks=pytest.mark.full),
    ],
)
def test_training_is_bit_by_bit_that_without_a_look_at_the_teacher(two_ranks, tmp_path, stage, settings):
    looked, plain = (
        two_ranks.run(
            task_evaluation.examined, stage, str(tmp_path / str(rows)), tasks=False, check_rows=rows, **settings
        )
        for rows in (3, 0)
    )
    for with_check, without in zip(looked, plain, strict=True):
        for what in ("losses", "completions", "weights", "random"):
            assert with_check[what] == without[what], what
