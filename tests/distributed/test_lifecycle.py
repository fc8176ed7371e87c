"""Trainers one after the other, and used again, on two ranks at every ZeRO stage, against one process."""

import itertools

import pytest

from tests.distributed.scenarios import adapters, lifecycle
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer, train

ACTIONS = ["evaluate", "train", "evaluate", "train"]
QUICK = [(0, "base", True), (3, "ema", False)]
OTHERS = [each for each in itertools.product([None, 0, 1, 2, 3], ["live", "base", "ema"], [False, True])
          if each not in QUICK]  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """What one process comes to."""
    made = {}

    def get(scenario, *arguments, **settings):
        key = repr((scenario, arguments, settings))
        if key not in made:
            made[key] = scenario(*arguments, per_device_train_batch_size=4, **settings)
        return made[key]

    return get


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifecycle")
    lifecycle.save_headless(folder / "headless")
    tiny.llama(tie_word_embeddings=False, attention_bias=True).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    trainer = make_trainer(model=str(folder / "model"), lora=True)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder


@pytest.mark.parametrize("stage, kind, lora", QUICK + [pytest.param(*each, marks=pytest.mark.full) for each in OTHERS])
def test_evaluated_and_trained_in_turn(two_ranks, plain, stage, kind, lora):
    """Before training, after it, and a second run, from the weights of the first."""
    expected = plain(lifecycle.in_turn, None, ACTIONS, teacher_model_kind=kind, lora=lora)
    for got in two_ranks.run(lifecycle.in_turn, stage, ACTIONS, teacher_model_kind=kind, lora=lora):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "stage, kind, lora", [pytest.param(2, "ema", True, marks=pytest.mark.full), (3, "base", False)]
)
def test_a_trainer_after_the_other(two_ranks, plain, stage, kind, lora):
    actions = ["train", "evaluate", "train"]
    expected = plain(lifecycle.in_turn, None, actions, again=True, teacher_model_kind=kind, lora=lora)
    for got in two_ranks.run(lifecycle.in_turn, stage, actions, again=True, teacher_model_kind=kind, lora=lora):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stages", [pytest.param((None, 2, 1), marks=pytest.mark.full), (3, 2)])
def test_trainers_of_several_stages_that_were_all_built_first(two_ranks, plain, stages):
    """Each trains with the configuration that it was built with, not with the last one of the process."""
    expected = plain(lifecycle.side_by_side, [None] * len(stages))
    for got in two_ranks.run(lifecycle.side_by_side, stages):
        assert got == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_one_config_for_several_trainers(two_ranks, stage):
    for first, second, third in two_ranks.run(lifecycle.one_config, stage):
        assert first == third and first.startswith("base ") and second.startswith("live ")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_run_after_one_that_failed(two_ranks, plain, stage):
    for got in two_ranks.run(lifecycle.stopped, stage):
        assert got == pytest.approx(plain(lifecycle.stopped, None), rel=2e-5)


def test_a_trainer_whose_model_was_taken_over(two_ranks):
    for late, sharded in two_ranks.run(lifecycle.taken_over, 3):
        assert "another trainer began to train its model: evaluate before" in late
        assert "sharded by ZeRO-3" in sharded and "save that model" in sharded


@pytest.mark.parametrize(
    "stage, lora", [(2, True), *(pytest.param(3, lora, marks=pytest.mark.full) for lora in (True, False))]
)
def test_two_runs_of_one_seed_are_the_same_to_the_last_bit(two_ranks, folder, stage, lora):
    for first, second in two_ranks.run(lifecycle.run_twice, stage, model=str(folder / "headless"), lora=lora):
        assert first == second


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.full), 3])
def test_a_saved_adapter_goes_on_being_trained(two_ranks, folder, stage):
    settings = {"model": str(folder / "adapter"), "teacher_model_kind": "ema"}
    expected = train(None, per_device_train_batch_size=4, **settings)
    for got in two_ranks.run(train, stage, **settings):
        assert got["losses"] == pytest.approx(expected["losses"], rel=2e-5)


def assert_right(found):
    for name, (teacher, before, after, moved) in found.items():
        assert teacher == ("AdapterOff" if name in adapters.SWITCHED_OFF else "FrozenShadow"), name
        assert before < 1e-4 and after < 1e-4, name
        assert moved > 1e-3, name


OFTEN = {"LoRA", "DoRA", "LoRA and tokens", "LoRA and biases", "PiSSA", "OLoRA", "VeRA", "IA3", "norms", "FourierFT"}
METHODS = [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.full) for name in adapters.PEFT_METHODS]


@pytest.mark.parametrize("method", METHODS)
def test_a_base_teacher_is_the_start_whatever_the_adapter(method):
    assert_right(adapters.base_teachers(None, [method]))


@pytest.mark.parametrize(
    "stage, methods",
    [
        (3, ["PiSSA", "LoRA and tokens"]),
        pytest.param(2, list(adapters.PEFT_METHODS), marks=pytest.mark.full),
        pytest.param(3, list(adapters.PEFT_METHODS), marks=pytest.mark.full),
    ],
)
def test_also_where_weights_are_sharded_when_they_are_loaded(two_ranks, folder, stage, methods):
    for found in two_ranks.run(adapters.base_teachers, stage, methods, model=str(folder / "model"), timeout=280):
        assert_right(found)
