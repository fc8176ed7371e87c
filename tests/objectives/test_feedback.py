"""Contexts made after the rollout: one call with all completions of a prompt, also where they lie on several ranks."""

import tempfile
from pathlib import Path

import pytest

from sdft_ds import SFTConfig
from sdft_ds.objectives.feedback import FeedbackError
from tests.distributed.ranks import RankError
from tests.distributed.scenarios import checkpoints
from tests.distributed.test_resume import INSIDE, assert_exact
from tests.helpers import tiny
from tests.helpers.cases import covering
from tests.helpers.steps import check_against_the_reference, first_step
from tests.helpers.trainers import Recorder, make_trainer, train

# Without contexts; of other lengths, so that ranks and micro-batches differ.
ROWS = [{"prompt": row["prompt"], "answer": f"A{i}"} for i, row in enumerate(tiny.rows())]


def wrong(prompts, completions, rows):
    """Another context for each sibling; every third has none."""
    assert len(prompts) == len(completions) == len(rows)
    return [
        f"Wrong: {len(completion[0]['content'])} letters, it is {row['answer']}. {i}" if i % 3 else None
        for i, (completion, row) in enumerate(zip(completions, rows, strict=True))
    ]


MADE = {"rows": ROWS, "functions": {"privileged_context_fn": wrong}}


def rollouts(trainer):
    found = [rollout for one in first_step(trainer) for rollout in one["scored"].batch.rollouts]
    return sorted(found, key=lambda rollout: rollout.row)


@pytest.mark.parametrize("loss_type, lora", covering(("dapo", "grpo"), (False, True)))
def test_a_step_equals_the_naive_reference_in_loss_and_gradients(loss_type, lora):
    trainer = make_trainer(
        **MADE, grown=lora, lora=lora, gradient_accumulation_steps=2, loss_type=loss_type, teacher_model_kind="base"
    )
    check_against_the_reference(trainer, within=2e-6)


def test_a_completion_without_a_context_is_left_out_or_keeps_the_data_sets():
    without = rollouts(make_trainer(**MADE, gradient_accumulation_steps=3))
    assert [each.in_loss for each in without] == [False, True, True] * 2
    assert [each.prompts.has_context for each in without] == [False, True, True] * 2
    mine = [{**row, "privileged_context": "The data set's."} for row in ROWS]
    kept = rollouts(make_trainer(**{**MADE, "rows": mine}, gradient_accumulation_steps=3))
    assert all(each.in_loss for each in kept)
    assert ["The data set's." in each.prompts.teacher.text for each in kept] == [True, False, False] * 2
    assert all(f" {i}<" in each.prompts.teacher.text for i, each in enumerate(kept) if i % 3)
    log = train(**MADE, max_steps=1, gradient_accumulation_steps=3)["logs"][0]
    assert log["contexts/made_share"] == pytest.approx(2 / 3) and log["contexts/missing_share"] == pytest.approx(1 / 3)
    assert log["seconds/feedback"] > 0


def siblings(folder, prompts, completions, rows):
    """Writes each call; the context says whether a sibling has the same answer."""
    with Path(folder, "calls").open("a") as file:
        file.write(f"{[prompt[0]['content'] for prompt in prompts]}\n")
    same = [sum(a == b and p == q for b, q in zip(completions, prompts, strict=True))
            for a, p in zip(completions, prompts, strict=True)]  # fmt: skip
    return [f"{n} of you say {c[0]['content'][:4]!r}." for n, c in zip(same, completions, strict=True)]


class Siblings:
    """`siblings` with its folder, as it can be sent to another process."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, *arguments):
        return siblings(self.folder, *arguments)


@pytest.mark.parametrize("stage, lora", covering((2, 3), (False, True)))
def test_siblings_on_two_ranks_are_one_group_of_one_call(two_ranks, tmp_path, stage, lora):
    """Two prompts with four completions each, two on each rank."""
    settings = {"rows": ROWS, "num_generations": 4, "steps_per_generation": 2, "lora": lora, "max_steps": 2,
                "teacher_model_kind": "base"}  # fmt: skip
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = {"privileged_context_fn": Siblings(str(tmp_path / "one"))}
    alone = train(**settings, per_device_train_batch_size=4, functions=one)
    two = {"privileged_context_fn": Siblings(str(tmp_path / "two"))}
    ranks = two_ranks.run(train, stage, **settings, functions=two)
    lie = [[each.prompts.student.text for batch in got["rollouts"][0] for each in batch] for got in ranks]
    assert lie[0] == lie[1] and len(set(lie[0])) == 2  # the same two prompts on both
    assert ranks[0]["completions"] != ranks[1]["completions"]
    calls = (tmp_path / "two" / "calls").read_text()
    assert calls == (tmp_path / "one" / "calls").read_text() and calls.count("\n") == 1
    for got in ranks:
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [INSIDE, *(pytest.param(each, marks=pytest.mark.full) for each in ({}, {"stream": True, **INSIDE}))],
)
def test_a_resumed_run_is_the_run_that_was_interrupted(two_ranks, tmp_path, settings):
    assert_exact(two_ranks.run(checkpoints.resume, 2, str(tmp_path), **MADE, teacher_model_kind="ema", **settings))


def test_an_evaluation_makes_them_too():
    figures = make_trainer(**MADE).evaluate()
    assert figures["eval_contexts/made_share"] == pytest.approx(2 / 3) and figures["eval_loss"] >= 0


# ---- what cannot be used --------------------------------------------------------------------------------------------


def raises(prompts, completions, rows):
    raise KeyError("answer")


def too_few(prompts, completions, rows):
    return ["one"]


def numbers(prompts, completions, rows):
    return [1.0] * len(prompts)


def nul(prompts, completions, rows):
    return ["a\0b"] * len(prompts)


MISTAKES = {
    raises: r"privileged_context_fn raises raised KeyError: 'answer' with row \d",
    too_few: "too_few returned 1 values for 2 completions; expected a list with a text or None for each",
    numbers: r"Row \d, column \"privileged_context_fn numbers's context\": found float '1.0'",
    nul: "found a NUL character at position 1",
}


@pytest.mark.parametrize("function", MISTAKES)
def test_a_function_that_fails_ends_the_run_with_one_line(function):
    trainer = make_trainer(rows=ROWS, functions={"privileged_context_fn": function}, max_steps=1)
    with pytest.raises(FeedbackError, match=MISTAKES[function]):
        trainer.train()


def test_so_it_does_on_every_rank(two_ranks):
    with pytest.raises(RankError) as caught:
        two_ranks.run(train, 2, rows=ROWS, functions={"privileged_context_fn": raises})
    assert str(caught.value).count("FeedbackError: privileged_context_fn raises raised KeyError") == 2


def test_rollouts_from_a_context_that_is_yet_to_be_made_are_refused():
    for name, value in (("generate_from_teacher", True), ("teacher_rollout_fraction", 0.5)):
        with pytest.raises(ValueError, match=f"{name}={value} rolls out from the teacher's prompt"):
            make_trainer(**MADE, **{name: value})
    with pytest.raises(ValueError, match="has no effect with SFTTrainer"):
        make_trainer(functions=MADE["functions"], config=SFTConfig)


def long(prompts, completions, rows):
    return ["word " * 2000] * len(prompts)


def test_a_context_is_cut_to_fit_or_left_out():
    function = {"rows": ROWS, "functions": {"privileged_context_fn": long}}
    cut = rollouts(make_trainer(**function, max_teacher_prompt_length=120))
    assert all(each.in_loss and len(each.prompts.teacher.ids) <= 120 for each in cut)
    assert not any(each.in_loss for each in rollouts(make_trainer(**function, max_teacher_prompt_length=20)))


def test_anchors_get_none():
    anchors = [{"prompt": "Hello"}]
    trainer = make_trainer(**MADE, anchors=anchors, anchor_fraction=0.5, num_generations=1, teacher_model_kind="base")
    one, other = sorted(rollouts(trainer), key=lambda each: each.prompts.anchor)
    assert other.prompts.anchor and other.in_loss and not other.prompts.has_context
    trainer = make_trainer(callbacks=[Recorder()], output_dir=tempfile.mkdtemp(), **MADE, anchors=anchors,
                           num_generations=1, teacher_model_kind="base", max_steps=2)  # fmt: skip
    trainer.train()


@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_rollout_in_flight_gets_them_when_it_is_scored(tmp_path, stream):
    """Before a stream's next rows are read, and after a resume."""

    checkpoint = tmp_path / "checkpoint-3"

    def run(again=None):
        recorder = Recorder()
        trainer = make_trainer(
            **MADE, stream=stream, callbacks=[recorder], max_steps=6, output_dir=str(tmp_path), save_strategy="steps",
            save_steps=3, num_iterations=2,
        )  # fmt: skip
        trainer.args.rollout_lag = 1  # as with a server, here with rollouts that end at once
        trainer.train(resume_from_checkpoint=again)
        return [log["loss"] for log in recorder.logs if "loss" in log]

    whole = run()
    assert (checkpoint / "next-generation-batch-rank-0.json").exists()
    assert run(str(checkpoint)) == whole[3:] and whole[3] != whole[2]
