import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from sdft_ds import SDFTConfig, SFTConfig, SFTTrainer
from sdft_ds.checkpoint.storage import CannotResume
from sdft_ds.cli.arguments import parse
from sdft_ds.data.rows import DataError, RowError
from sdft_ds.loss.chunked import Adapter, HeadValues, LossTerms, chunked_distillation_loss
from sdft_ds.loss.divergence import CrossEntropy
from tests.cli.test_train import PLAIN, TWO_STEPS, command
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer, train


def sft(**settings):
    return make_trainer(config=SFTConfig, **settings)


def batches_of_step(trainer):
    loader = trainer.get_train_dataloader()
    inputs, _ = trainer.get_batch_samples(iter(loader), trainer.args.gradient_accumulation_steps, torch.device("cpu"))
    return inputs


def rollouts(trainer):
    return [rollout for one in batches_of_step(trainer) for rollout in one["scored"].batch.rollouts]


@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_those_of_transformers_own_cross_entropy(lora):
    trainer = sft(lora=lora, gradient_accumulation_steps=3, max_completion_length=64)
    inputs = batches_of_step(trainer)
    trainer.model.train()
    for one in inputs:
        trainer.compute_loss(trainer.model, one).backward()
    ours = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer.model.eval()  # its dropout is its own again
    rows = [rollout for one in inputs for rollout in one["scored"].batch.rollouts]
    count = sum(len(rollout.completion.ids) for rollout in rows)
    for rollout in rows:
        prompt, answer = rollout.prompts.student.ids, rollout.completion.ids
        labels = torch.tensor([[-100] * len(prompt) + answer])
        trainer.model(
            input_ids=torch.tensor([prompt + answer]), labels=labels, num_items_in_batch=count
        ).loss.backward()
    assert ours.keys() == {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            assert (ours[name] - p.grad).norm() <= 2e-6 * p.grad.norm() + 1e-9, name


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_the_chunked_cross_entropy_is_the_whole_one(chunk):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((13, 8), (37, 8), (37,)))
    down, up = torch.randn(2, 8, requires_grad=True), torch.randn(37, 2, requires_grad=True)
    tokens, weights, scale = torch.randint(37, (13,)), torch.rand(13), torch.tensor(0.3)
    leaves = (hidden, weight, bias, down, up)
    head = HeadValues(weight, bias, Adapter(down, up, 0.5))
    terms = LossTerms(CrossEntropy(), None, None, tokens, weights)
    loss, per_token, _ = chunked_distillation_loss(hidden, head, terms, scale, torch.tanh, chunk)
    logits = torch.tanh(F.linear(hidden, weight, bias) + 0.5 * hidden @ down.T @ up.T)
    expected = F.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(per_token, expected.detach())
    wanted = torch.autograd.grad(scale * (expected * weights).sum(), leaves)
    for gradient, reference in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, reference)


def test_the_rows_and_their_order_are_those_of_sdft():
    settings = {"num_generations": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainers = [make_trainer(**settings), sft(**settings)]
    loaders = [iter(trainer.get_train_dataloader()) for trainer in trainers]
    for _ in range(2):
        seen = []
        for trainer, loader in zip(trainers, loaders, strict=True):
            inputs, _ = trainer.get_batch_samples(loader, 2, torch.device("cpu"))
            rows = sorted((r for one in inputs for r in one["scored"].batch.rollouts), key=lambda rollout: rollout.row)
            seen.append([(rollout.row, rollout.prompts) for rollout in rows])
        assert seen[0] == seen[1] and len(seen[0]) == 4


def test_the_completion_is_the_demonstration_and_its_end():
    trainer = sft(per_device_train_batch_size=6, max_completion_length=24)
    tokenizer = trainer.processing_class
    hints = {row["prompt"][0]["content"]: row["privileged_context"] for row in tiny.rows()}
    made = rollouts(trainer)
    for rollout in made:
        whole = tokenizer(hints[rollout.prompts.student.prompt[-1]["content"]])["input_ids"] + [tokenizer.eos_token_id]
        assert rollout.completion.ids == whole[:24] and rollout.completion.truncated == (len(whole) > 24)
    assert {rollout.completion.truncated for rollout in made} == {True, False}


def with_rows(rows, **settings):
    trainer = sft(**settings)
    trainer.train_dataset = Dataset.from_list(rows)
    return trainer


def test_the_golden_response_comes_before_the_context():
    rows = [{"prompt": "a", "privileged_context": "hint", "golden_response": text} for text in ("gold", None)]
    trainer = with_rows(rows, shuffle_dataset=False)
    assert [trainer.processing_class.decode(r.completion.ids[:-1]) for r in rollouts(trainer)] == ["gold", "hint"]
    with pytest.raises(RowError, match="Row 0, column 'golden_response': found int; expected text"):
        rollouts(with_rows([{"prompt": "a", "privileged_context": "hint", "golden_response": 4}]))


def test_rows_and_anchors_without_a_demonstration_are_refused_before_the_first_step():
    rows = [{**row, "golden_response": "yes", "teacher_prompt": None} for row in tiny.rows(3)]
    rows[2] |= {"golden_response": None, "teacher_prompt": rows[2]["prompt"]}
    with pytest.raises(DataError, match="train_dataset.*Row 2.*golden_response.*found nothing.*bad_rows='skip'"):
        sft(rows=rows)
    with pytest.warns(UserWarning, match="1 of 3 rows are invalid and skipped"):
        assert len(sft(rows=rows, bad_rows="skip").train_dataset) == 2
    anchors = [{"prompt": "a", "golden_response": "b"}, {"prompt": "c", "golden_response": None}]
    with pytest.raises(DataError, match="anchor_dataset.*Row 1.*golden_response of the anchors.*found nothing"):
        sft(anchors=anchors, num_generations=1)


def test_of_several_end_tokens_an_answer_ends_with_that_of_its_template():
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    model.generation_config.eos_token_id = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    turn = [{"prompt": [{"role": "user", "content": "a"}], "privileged_context": "b"}] * 2
    trainer = with_rows(turn, model=model)
    trainer.processing_class.eos_token = "<|im_start|>"  # not what the template ends a turn with
    assert {rollout.completion.ids[-1] for rollout in rollouts(trainer)} == {tokenizer.eos_token_id}
    text = with_rows([{"prompt": "a", "privileged_context": "b"}] * 2, model=tiny.llama())
    assert {rollout.completion.ids[-1] for rollout in rollouts(text)} == {tokenizer.eos_token_id}


def test_it_learns_and_logs_and_evaluates():
    got = train(config=SFTConfig, max_steps=12, max_completion_length=64)
    assert got["losses"][-1] < 0.6 * got["losses"][0]
    wanted = "loss grad_norm learning_rate completions/loss_tokens seconds/student seconds/optimizer memory/peak_gib"
    assert set(wanted.split()) <= got["logs"][0].keys() and "sdft/distillation_loss" not in got["logs"][0]
    assert got["logs"][0]["seconds/teacher"] == 0.0
    trainer = sft(max_completion_length=64, per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(got["losses"][0], rel=0.2)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_are_one(two_ranks, stage):
    expected = train(config=SFTConfig, per_device_train_batch_size=4, lora=stage == 3)
    for got in two_ranks.run(train, stage, config=SFTConfig, lora=stage == 3):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)


def test_settings_that_are_not_read_are_warned_about_by_name():
    with pytest.warns(UserWarning, match="does not read distillation_alpha, teacher_model_kind, num_generations"):
        args = SFTConfig(teacher_model_kind="ema", distillation_alpha=0.0, num_generations=4)
    assert (args.teacher_model_kind, args.num_generations) == ("live", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SFTConfig(num_generations=1, per_device_train_batch_size=3)
        mine = ["--method", "sft", "--model_name_or_path", "m", "--dataset_path", "d"]
        _, args, _ = parse([*mine, "--recipe", "paper"], {})
    assert (args.num_loss_tokens_to_skip, args.learning_rate, args.max_completion_length) == (0, 2e-5, 1024)
    with pytest.warns(UserWarning, match=r"does not read teacher_update_rate\."):
        parse([*mine, "--recipe", "paper", "--teacher_update_rate", "0.1"], {})


def test_it_needs_a_configuration_of_its_own():
    with pytest.raises(TypeError, match="SFTTrainer needs an SFTConfig"):
        SFTTrainer(tiny.llama(), SDFTConfig(), processing_class=tiny.tokenizer())


def test_a_checkpoint_of_the_other_method_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "save_strategy": "steps", "num_generations": 1}
    make_trainer(**settings).train()
    with pytest.raises(CannotResume, match="method is 'sft' and was 'sdft'"):
        sft(**settings).train(resume_from_checkpoint=True)


@pytest.mark.full
def test_from_the_command_line(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Question {i}", "answer": f"Answer {i}"} for i in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--model_name_or_path", tmp_path / "model", "--dataset_path", tmp_path / "train.jsonl"]
    done = command(
        *PLAIN, *own, *TWO_STEPS, "--golden_response_column", "answer", "--method", "sft", "--output_dir", tmp_path
    )
    assert "does not read num_generations." in done.stderr and "The loss " in done.stdout
    assert (tmp_path / "model.safetensors").exists()
