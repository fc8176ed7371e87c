"""Anchors: prompts without context on which the student is held to its start; supervised fine-tuning replays them."""

import functools

import pytest
import torch
from datasets import Dataset

from sdft_ds import SDFTTrainer, SFTConfig
from sdft_ds.data.rows import DataError
from tests.distributed.scenarios import checkpoints
from tests.distributed.test_resume import INSIDE, assert_exact
from tests.helpers import reference, tiny
from tests.helpers.cases import covering
from tests.helpers.steps import check_against_the_reference, first_step
from tests.helpers.trainers import Recorder, grown_student, make_trainer, train

# Of other lengths than the rows, so that ranks and micro-batches differ.
ANCHORS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i}? {'Say more. ' * (i % 4)}"}],
        "golden_response": f"It is {i}.",
    }
    for i in range(5)
]
HELD = {"anchors": ANCHORS, "teacher_model_kind": "base", "num_generations": 1, "anchor_fraction": 0.5}


def rollouts(trainer):
    return [rollout for one in first_step(trainer) for rollout in one["scored"].batch.rollouts]


@pytest.mark.parametrize("loss", [{"loss_type": "dapo"}, {"loss_type": "grpo", "teacher_temperature": 0.5}])
@pytest.mark.parametrize("lora", [False, True])
def test_a_step_equals_the_naive_reference_in_loss_and_gradients(loss, lora):
    trainer = make_trainer(lora=lora, gradient_accumulation_steps=2, **loss, **HELD)
    if lora:  # at its start an adapter changes nothing, and the teacher would be the student
        for name, param in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.3)
    check_against_the_reference(trainer, within=2e-6)
    held = [rollout for rollout in rollouts(trainer) if rollout.prompts.anchor]
    assert len(held) == 2 and all(each.prompts.teacher == each.prompts.student for each in held)


def test_anchors_are_counted_apart_and_cost_nothing_at_the_start():
    first, *others = train(**HELD, max_steps=4, per_device_train_batch_size=6)["logs"]
    assert (
        first["anchors/distillation_loss"] == pytest.approx(0.0, abs=1e-6) and first["sdft/distillation_loss"] > 1e-3
    )
    assert all(log["anchors/distillation_loss"] > 1e-6 for log in others)
    assert first["loss"] < first["sdft/distillation_loss"]  # of which half of the tokens are anchors'


def test_anchors_hold_the_student_to_its_start():
    """After the same steps the student is nearer to its start on the anchors than without them."""

    def moved(**settings):
        trainer = make_trainer(rows=4, max_steps=12, teacher_model_kind="base", num_generations=1, **settings)
        prompts = [trainer.prompts.render(row["prompt"]).ids for row in ANCHORS]
        before = _log_probs(trainer.model, prompts)
        trainer.train()
        after = _log_probs(trainer.model, prompts)
        return sum((b.exp() * (b - a)).sum().item() for b, a in zip(before, after, strict=True))

    free = moved(per_device_train_batch_size=2)
    assert moved(per_device_train_batch_size=4, anchors=ANCHORS, anchor_fraction=0.5) < 0.6 * free


def _log_probs(model, prompts):
    """The distribution of the first token of an answer to each prompt."""
    model.eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]


@pytest.mark.parametrize("stage, lora", covering((2, 3), (False, True)))
def test_two_ranks_are_one(two_ranks, stage, lora):
    settings = {**HELD, "lora": lora}
    alone = train(**settings, per_device_train_batch_size=4)
    ranks = two_ranks.run(train, stage, **settings)
    assert ranks[0]["completions"] != ranks[1]["completions"]
    for got in ranks:
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        for name in ("anchors/distillation_loss", "anchors/mean_length"):
            assert [log[name] for log in got["logs"]] == pytest.approx([log[name] for log in alone["logs"]], rel=1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_a_resumed_run_is_the_run_that_was_interrupted(two_ranks, tmp_path, inside):
    settings = {**HELD, **(INSIDE if inside else {})}
    assert_exact(two_ranks.run(checkpoints.resume, 2, str(tmp_path), **settings))


def test_without_a_teacher_kind_it_is_the_start():
    assert make_trainer(anchors=ANCHORS).args.teacher_model_kind == "base"


@pytest.mark.parametrize(
    "kind, lora", [("live", False), ("ema", False), ("ema", "on the head"), ("live", "head saved")]
)
def test_another_teacher_is_refused(kind, lora):
    with pytest.raises(ValueError, match=f"the teacher is {kind}: set teacher_model_kind=base"):
        make_trainer(anchors=ANCHORS, teacher_model_kind=kind, lora=lora)


# ---- beside another teacher, with the adapter off -------------------------------------------------------------------

FEW = {**HELD, "anchor_fraction": 0.25, "grown": True, "lora": True, "max_steps": 6, "distillation_alpha": 0.0,
       "distillation_mode": "full_logits"}  # fmt: skip

KINDS = {
    "live": {"teacher_model_kind": "live"},
    "ema": {
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.3,
        "teacher_sync_steps": 2,
        "teacher_temperature": 0.5,
    },
}


@pytest.fixture(scope="module")
def literal():
    """(losses, gradient norms) of a plain loop with a second model, whose anchors are held to the one without adapter,
    and ours."""

    @functools.cache
    def get(kind):
        ours = train(**{**FEW, **KINDS[kind]}, per_device_train_batch_size=4)
        losses, norms, _ = reference.train(
            grown_student(True), ours["rollouts"], kind, True, rate=0.3, sync_steps=2, alpha=0.0,
            teacher_temperature=KINDS[kind].get("teacher_temperature", 1.0),
        )  # fmt: skip
        return losses, norms, ours

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_beside_another_teacher_anchors_are_held_to_the_model_without_its_adapter(literal, kind):
    losses, norms, ours = literal(kind)
    assert ours["losses"] == pytest.approx(losses, rel=5e-6) and ours["grad_norms"] == pytest.approx(norms, rel=2e-5)
    assert ours["logs"][0]["anchors/distillation_loss"] > 1e-3  # an adapter that changes something


@pytest.mark.parametrize("stage, kind", covering((2, 3), tuple(KINDS)))
def test_so_they_are_where_a_rank_has_none(two_ranks, literal, stage, kind):
    losses, norms, _ = literal(kind)
    ranks = two_ranks.run(train, stage, **{**FEW, **KINDS[kind]})
    held = [
        [sum(each.prompts.anchor for batch in step for each in batch) for step in got["rollouts"]] for got in ranks
    ]
    assert held == [[0] * 6, [1] * 6]
    for got in ranks:
        assert got["losses"] == pytest.approx(losses, rel=5e-6)
        assert got["grad_norms"] == pytest.approx(norms, rel=2e-5)


def test_a_resumed_run_beside_another_teacher_is_the_run_that_was_interrupted(two_ranks, tmp_path):
    settings = {**HELD, **INSIDE, "teacher_model_kind": "ema", "lora": True}
    assert_exact(two_ranks.run(checkpoints.resume, 2, str(tmp_path), **settings))


def test_bad_anchors_are_named():
    with pytest.raises(DataError, match="anchor_dataset has the columns question, and lacks prompt"):
        make_trainer(anchors=[{"question": "?"}])
    with pytest.raises(DataError, match="anchor_dataset: Row 1, column 'prompt': found an empty text"):
        make_trainer(anchors=[{"prompt": "Hello"}, {"prompt": ""}])
    with pytest.raises(ValueError, match="anchor_fraction needs anchors"):
        make_trainer(anchor_fraction=0.5)
    with pytest.raises(ValueError, match=r"anchor_fraction must be in \(0, 1\)"):
        make_trainer(anchors=ANCHORS, anchor_fraction=1.0)


def test_supervised_fine_tuning_replays_their_answers():
    trainer = make_trainer(config=SFTConfig, anchors=ANCHORS, anchor_fraction=0.5, max_completion_length=64)
    texts = {
        trainer.prompts.tokenizer.decode(r.completion.ids, skip_special_tokens=True): r for r in rollouts(trainer)
    }
    replayed = {text for text, rollout in texts.items() if rollout.prompts.anchor}
    assert len(replayed) == len(texts) / 2 and replayed < {row["golden_response"] for row in ANCHORS}
    without = [{"prompt": row["prompt"]} for row in ANCHORS]
    with pytest.raises(DataError, match="column 'golden_response of the anchors': found nothing"):
        make_trainer(config=SFTConfig, anchors=without, anchor_fraction=0.5)


def test_python_takes_them_as_an_argument(tmp_path):
    trainer = make_trainer(teacher_model_kind="base")
    made = SDFTTrainer(
        tiny.llama(), trainer.args, trainer.train_dataset, processing_class=tiny.tokenizer(),
        anchor_dataset=Dataset.from_list(ANCHORS),
    )  # fmt: skip
    assert len(made.anchor_dataset) == len(ANCHORS) and made.args.anchor_share == 0.25


# ---- rollouts from the teacher's prompt -----------------------------------------------------------------------------


class Selected(Recorder):
    def on_generation_prompts_selected(self, args, state, control, generation_prompt_text=None, **kwargs):
        self.rollouts.append(["Hint" in text for text in generation_prompt_text])


def shares(**settings):
    """The share of rollouts from the teacher's prompt in each step: those whose prompt holds the hint."""
    seen = Selected()
    make_trainer(callbacks=[seen], rows=32, num_generations=1, per_device_train_batch_size=32, **settings).train()
    return [sum(each) / len(each) for each in seen.rollouts]


def test_the_share_from_the_teachers_prompt_falls_to_nothing():
    falling = shares(teacher_rollout_fraction=1.0, max_steps=4)
    assert falling[0] == 1.0 and falling == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=0.25)
    assert falling[1] < 1.0 and falling[3] < falling[1]
    assert shares(teacher_rollout_fraction=0.5, max_steps=2)[0] == pytest.approx(0.5, abs=0.2)
    assert shares(max_steps=1) == [0.0] and shares(generate_from_teacher=True, max_steps=2) == [1.0, 1.0]


def test_the_choice_is_the_rows_on_any_number_of_ranks(two_ranks):
    settings = {"num_generations": 1, "teacher_rollout_fraction": 0.6, "teacher_model_kind": "base"}
    alone = train(**settings, per_device_train_batch_size=4)
    for got in two_ranks.run(train, 2, **settings):
        assert got["losses"] == pytest.approx(alone["losses"], rel=1e-4)
