"""SDPO: the teacher's context is a rewarded completion of the same prompt, or feedback, against a plain reference."""

import copy
import re
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from sdft_ds import SDPOConfig, SDPOTrainer
from sdft_ds.demo import rewards
from sdft_ds.objectives import feedback
from sdft_ds.objectives.feedback import FeedbackError
from tests.distributed.ranks import RankError
from tests.distributed.scenarios import checkpoints
from tests.distributed.test_resume import INSIDE, assert_exact
from tests.helpers import reference, tiny
from tests.helpers.cases import covering
from tests.helpers.steps import loss_and_gradients
from tests.helpers.trainers import grown_student, make_trainer, train

ROWS = [{"prompt": row["prompt"], "n": i} for i, row in enumerate(tiny.rows())]


def third(completion_ids, n, **others):
    """1 where the sum of a completion's tokens is a multiple of 3, and more for later rows."""
    return [(sum(ids) % 3 == 0) * (1.0 + 0.1 * i) for ids, i in zip(completion_ids, n, strict=True)]


SDPO = {"config": SDPOConfig, "rows": ROWS, "functions": {"reward_funcs": third}, "num_generations": 4,
        "per_device_train_batch_size": 4}  # fmt: skip


def plain_loss(student, teacher, rollouts, weight=1.0, size=4, loss_type="dapo", old=None):
    """The loss of one optimizer step, one row at a time. rollouts: of all ranks; old: the student at the rollout."""
    rollouts = sorted(rollouts, key=lambda each: each.row)
    rewards = [(sum(each.completion.ids) % 3 == 0) * (1.0 + 0.1 * index_of(each)) for each in rollouts]
    rows = []
    for i, rollout in enumerate(rollouts):
        group = range(i // size * size, i // size * size + size)
        of_group = torch.tensor([rewards[j] for j in group], dtype=torch.float64)
        advantage = ((rewards[i] - of_group.mean()) / (of_group.std() + 1e-4)).item()
        successes = [j for j in group if rewards[j] >= 1.0 and j != i]
        assert rollout.reward == pytest.approx(rewards[i]) and rollout.advantage == pytest.approx(advantage)
        assert (rollout.prompts.teacher.ids != rollout.prompts.student.ids) == bool(successes)
        if successes:
            solved = tiny.tokenizer().decode(rollouts[successes[0]].completion.ids, skip_special_tokens=True)
            solved = solved.replace("\0", "")  # which no prompt may hold
            question = rollout.prompts.student.prompt[0]["content"]
            asked = f"{question}\nCorrect solution:\n\n{solved}\n\n\n\nCorrectly solve the original question.\n"
            assert rollout.prompts.teacher.prompt == [{"role": "user", "content": asked}]
        ids = rollout.completion.ids
        s, t = (
            F.log_softmax(reference.logits_of_completion(model, prompt.ids, ids, 1.0), -1)[range(len(ids)), ids]
            for model, prompt in ((student, rollout.prompts.student), (teacher, rollout.prompts.teacher))
        )
        before = s.detach()
        if old is not None:
            before = F.log_softmax(reference.logits_of_completion(old, rollout.prompts.student.ids, ids, 1.0), -1)
            before = before[range(len(ids)), ids].detach()
        ratio = (s - before).exp()
        divergence = (s - t).detach() * s * ratio.detach().clamp(max=2.0) * bool(successes)
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        token = weight * divergence + (1 - weight) * policy
        counts = not rollout.empty and (bool(successes) or weight < 1.0)
        rows.append((token.sum() * counts, len(ids) * counts))
    sums, lengths = zip(*rows, strict=True)
    if loss_type == "dapo":
        return sum(sums) / max(1, sum(lengths))
    return sum(x / max(1, n) for x, n in rows) / len(rows)


def index_of(rollout):
    return int(re.search(r"Question (\d+)", rollout.prompts.student.text)[1])


CASES = covering((1.0, 0.4, 0.0), ("dapo", "grpo"), (False, True))


@pytest.mark.parametrize("weight, loss_type, lora", CASES)
def test_a_step_equals_the_plain_reference_in_loss_and_gradients(weight, loss_type, lora):
    trainer = make_trainer(
        **SDPO, grown=bool(lora), lora=lora, gradient_accumulation_steps=2, loss_type=loss_type,
        distillation_weight=weight, teacher_model_kind="base" if lora else "ema",
    )  # fmt: skip
    loss, gradients, inputs = loss_and_gradients(trainer)
    rollouts = [rollout for one in inputs for rollout in one["scored"].batch.rollouts]
    assert {each.prompts.has_context for each in rollouts} == {True, False}  # or the masks would not be tested
    student, teacher = trainer.model.eval(), copy.deepcopy(trainer.model).eval()
    student.zero_grad()
    expected = plain_loss(
        student, reference.WithoutAdapter(teacher) if lora else teacher, rollouts, weight, loss_type=loss_type
    )
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    wanted = {name: param.grad for name, param in student.named_parameters() if param.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-8, name


@pytest.fixture(scope="module")
def literal():
    """(losses, gradient norms) of a plain loop over the rollouts of a run, with a second model as its teacher."""

    def run(rollouts_by_step, weight, kind, lora):
        student = grown_student(lora).eval()
        teacher = copy.deepcopy(student).requires_grad_(False)
        trained = {name: param for name, param in student.named_parameters() if param.requires_grad}
        groups = [[p for p in trained.values() if (p.ndim > 1) == matrices] for matrices in (True, False)]
        optimizer = torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-2, eps=1e-3, weight_decay=0.0)
        losses, norms = [], []
        for rollouts in rollouts_by_step:
            loss = plain_loss(
                student, reference.WithoutAdapter(teacher) if kind == "base" else teacher, rollouts, weight
            )
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item())
            losses.append(loss.item())
            optimizer.step()
            if kind == "ema":
                with torch.no_grad():
                    for name, param in teacher.named_parameters():
                        if name in trained:
                            param.copy_(0.7 * param + 0.3 * trained[name])
        return losses, norms

    return run


STAGES = covering((0, 2, 3), (False, True), (1.0, 0.4))


@pytest.mark.parametrize("stage, lora, weight", STAGES)
def test_siblings_on_two_ranks_train_as_the_plain_loop(two_ranks, literal, stage, lora, weight):
    """Two prompts with four completions each, two on each rank."""
    kind = "base" if lora else "ema"
    settings = {**SDPO, "per_device_train_batch_size": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2,
                "teacher_model_kind": kind, "teacher_update_rate": 0.3, "distillation_weight": weight}  # fmt: skip
    if lora:
        settings |= {"grown": True, "lora": True}
    ranks = two_ranks.run(train, stage, **settings)
    steps = [[[r for batch in step for r in batch] for step in got["rollouts"]] for got in ranks]
    for one, other in zip(*steps, strict=True):
        # Each prompt has completions on both ranks, and some teacher saw a completion of the other rank.
        assert {index_of(each) for each in one} == {index_of(each) for each in other}
        assert {each.row for each in one}.isdisjoint(each.row for each in other)
    losses, norms = literal([one + other for one, other in zip(*steps, strict=True)], weight, kind, lora)
    for got in ranks:
        assert got["losses"] == pytest.approx(losses, rel=2e-5, abs=1e-6)
        if stage:  # DeepSpeed logs none at stage 0
            assert got["grad_norms"] == pytest.approx(norms, rel=5e-5)
    solved = [each for rollouts in steps for step in rollouts for each in step if each.prompts.has_context]
    assert solved and "Correct solution" in solved[0].prompts.teacher.text
    logs = ranks[0]["logs"]
    assert all(0 < log["rewards/success_share"] <= 1 and log["contexts/missing_share"] < 1 for log in logs)


@pytest.mark.parametrize("weight", [0.4, pytest.param(1.0, marks=pytest.mark.full)])
def test_a_resumed_run_is_the_run_that_was_interrupted(two_ranks, tmp_path, weight):
    """Inside a generation batch: rewards, advantages and contexts are part of it."""
    settings = {**SDPO, **INSIDE, "per_device_train_batch_size": 2, "distillation_weight": weight}
    assert_exact(two_ranks.run(checkpoints.resume, 2, str(tmp_path), **settings))


# ---- contexts -------------------------------------------------------------------------------------------------------


def rollouts_of(**settings):
    trainer = make_trainer(**{**SDPO, **settings})
    _, _, inputs = loss_and_gradients(trainer)
    found = [rollout for one in inputs for rollout in one["scored"].batch.rollouts]
    return sorted(found, key=lambda each: each.row)


def test_which_completion_and_which_feedback_the_teacher_sees():
    rows = [{**row, "privileged_context": f"Mind {i}." if i % 2 else None} for i, row in enumerate(ROWS)]
    told = {"rows": rows, "include_environment_feedback": True, "gradient_accumulation_steps": 4}
    for each in rollouts_of(**told):
        text = each.prompts.teacher.text
        assert ("unsuccessful earlier attempt:\n\nMind" in text) == bool(index_of(each) % 2)
    for each in rollouts_of(**told, environment_feedback_only_without_solution=True):
        text = each.prompts.teacher.text
        assert ("Mind" in text) == (index_of(each) % 2 == 1 and "Correct solution" not in text)
    own = rollouts_of(dont_reprompt_on_self_success=False)
    assert [each.prompts.has_context for each in own] == [any(each.reward for each in own)] * 4  # itself as well
    assert not any(
        each.prompts.has_context
        for each in rollouts_of(use_successful_as_teacher=False, include_environment_feedback=True)
    )


def comments(prompts, completions, rows):
    return [f"Row {row['n']} again." for row in rows]


def test_feedback_may_be_made_of_the_answer():
    functions = {"reward_funcs": third, "privileged_context_fn": comments}
    found = rollouts_of(functions=functions, include_environment_feedback=True)
    assert all(f"Row {index_of(each)} again." in each.prompts.teacher.text for each in found)
    with pytest.raises(ValueError, match="include_environment_feedback=False leaves out"):
        make_trainer(**{**SDPO, "functions": functions})


def thinks(completion_ids, **others):
    return [1.0] * len(completion_ids)


def test_thinking_is_not_shown(monkeypatch):
    gather = feedback.gather
    thoughts = "<think>\nno\n</think> Yes."
    monkeypatch.setattr(feedback, "gather", lambda found: [replace(each, text=thoughts) for each in gather(found)])
    shown = rollouts_of(functions={"reward_funcs": thinks}, remove_thinking_from_demonstration=True)
    assert all("Correct solution:\n\nYes.\n\n" in each.prompts.teacher.text for each in shown)


# ---- rewards --------------------------------------------------------------------------------------------------------


def fails_at_two(n, **others):
    if 2 in n:
        raise KeyError("no answer")
    return [1.0] * len(n)


def not_a_number(n, **others):
    return [float("nan") if i == 2 else 1.0 for i in n]


def too_few(n, **others):
    return [1.0]


def sleeps(n, **others):
    time.sleep(30)


def says(n, **others):
    return ["good"] * len(n)


MISTAKES = {
    fails_at_two: "The reward fails_at_two raised KeyError: 'no answer' with row 2",
    not_a_number: "The reward not_a_number returned nan with row 2; expected a finite number or None",
    too_few: r"The reward too_few returned 1 values for 4 completions of row \d",
    sleeps: r"The reward sleeps took longer than reward_timeout=0.2 s with row \d",
    says: r"The reward says returned 'good' with row \d; expected",
}


@pytest.mark.parametrize("function", MISTAKES)
def test_a_reward_that_fails_ends_the_run_or_is_unknown(function):
    settings = {**SDPO, "functions": {"reward_funcs": function}, "reward_timeout": 0.2, "max_steps": 6,
                "gradient_accumulation_steps": 1}  # fmt: skip
    with pytest.raises(FeedbackError, match=MISTAKES[function]):
        make_trainer(**settings).train()
    logs = train(**{**settings, "reward_errors": "skip", "max_steps": 2 if function is sleeps else 6})["logs"]
    assert sum(log.get("rewards/unknown", 0) for log in logs) == (
        4 if function in (fails_at_two, not_a_number) else 4 * len(logs)
    )


def never(n, **others):
    return [0.0] * len(n)


def test_without_a_solution_or_feedback_nothing_is_learned_and_it_says_why():
    trainer = make_trainer(**{**SDPO, "functions": {"reward_funcs": never}, "max_steps": 1})
    with pytest.warns(UserWarning, match="no completion had a solution of its prompt or feedback"):
        trainer.train()


def test_so_it_does_on_every_rank(two_ranks):
    """Also on the rank whose rewards did not fail."""
    with pytest.raises(RankError) as caught:
        settings = {**SDPO, "functions": {"reward_funcs": fails_at_two}, "max_steps": 6}
        two_ranks.run(train, 2, **settings, shuffle_dataset=False)
    assert str(caught.value).count("FeedbackError: The reward fails_at_two raised KeyError") == 2


def third_but_not_of_row_2(completion_ids, n, **others):
    if 2 in n:
        raise KeyError("no answer")
    return third(completion_ids, n)


@pytest.mark.parametrize("stage", [None, pytest.param(3, marks=pytest.mark.full)])
def test_the_steps_before_it_are_saved(two_ranks, tmp_path, stage):
    """A run that goes on with a mended reward is the run that never failed."""
    run = {**SDPO, "max_steps": 4, "shuffle_dataset": False, "gradient_accumulation_steps": 1}
    whole = two_ranks.run(train, stage, **run)
    broken = {**run, "functions": {"reward_funcs": third_but_not_of_row_2}, "output_dir": str(tmp_path)}
    with pytest.raises(RankError):
        two_ranks.run(train, stage, **broken)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    mended = two_ranks.run(train, stage, **run, output_dir=str(tmp_path), resume=True)
    for uninterrupted, resumed in zip(whole, mended, strict=True):
        assert resumed["losses"] == uninterrupted["losses"][1:]
        assert all(torch.equal(resumed["weights"][name], each) for name, each in uninterrupted["weights"].items())


def half(completion_ids, **others):
    return [None if len(ids) % 2 else 0.5 for ids in completion_ids]


def test_several_rewards_are_added_up():
    two = {"functions": {"reward_funcs": [third, half]}, "reward_weights": [1.0, 4.0]}
    for each in rollouts_of(**two):
        ids = each.completion.ids
        assert each.reward == pytest.approx(third([ids], [index_of(each)])[0] + (0.0 if len(ids) % 2 else 2.0))
    with pytest.raises(ValueError, match="reward_weights has 1 values, and there are 2 rewards"):
        make_trainer(**{**SDPO, **two, "reward_weights": [1.0]})
    with pytest.raises(ValueError, match="reward_weights must be finite numbers or None, not"):
        make_trainer(**{**SDPO, **two, "reward_weights": [1.0, float("nan")]})
    with pytest.raises(ValueError, match="give reward_funcs"):
        SDPOTrainer(tiny.llama())


class Heard(TrainerCallback):
    def on_teacher_context_built(self, args, state, control, **payload):
        self.payload = payload


def test_callbacks_hear_of_the_contexts():
    heard = Heard()
    trainer = make_trainer(**SDPO, callbacks=[heard])
    _, _, inputs = loss_and_gradients(trainer)
    names = ("teacher_input_ids", "teacher_attention_mask", "completion_mask", "self_distillation_mask")
    ids, mask, completion_mask, learns = (heard.payload[name] for name in names)
    found = sorted((each for one in inputs for each in one["scored"].batch.rollouts), key=lambda each: each.row)
    assert learns.tolist() == [float(each.prompts.has_context) for each in found]
    for row, each in enumerate(found):
        assert ids[row][mask[row].bool()].tolist() == each.prompts.teacher.ids + each.completion.ids
        assert completion_mask[row].sum() == len(each.completion.ids)


def test_what_cannot_teach_is_refused():
    for settings, words in (
        ({"num_generations": 1}, "a completion has no siblings"),
        ({"use_successful_as_teacher": False}, "would know no more than the student"),
        ({"distillation_weight": 1.5}, r"distillation_weight must be in \[0, 1\]"),
        ({"reprompt_template": "{prompt}{solution}"}, "reprompt_template lacks the placeholder {feedback}"),
        ({"solution_template": "{answer}"}, "solution_template: unknown placeholder {answer}; only"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' would have no effect here"),
        ({"generate_from_teacher": True}, "generate_from_teacher=True rolls out from the teacher's prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(**{**SDPO, **settings})


def test_the_defaults_are_trls():
    args = make_trainer(**SDPO).args
    assert (args.distillation_mode, args.distillation_alpha, args.distillation_topk) == ("sampled_token", 1.0, None)
    assert (args.teacher_model_kind, args.teacher_update_rate, args.teacher_sync_steps) == ("ema", 0.05, 1)
    assert (args.success_reward_threshold, args.max_reprompt_len, args.loss_type) == (1.0, 10240, "dapo")


@pytest.mark.full
def test_the_demo_learns_its_rule():
    before, after = rewards.run("sdpo", seed=0, steps=120)
    assert before < 0.5 and after > before + 0.15
