"""Trainers one after the other, a trainer used again, and what their caller gave them: it stays as it was."""

import copy
import json
import pickle

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer, SFTConfig, SFTTrainer, train
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.model import completion_forward
from tests.distributed.scenarios import lifecycle
from tests.helpers import tiny
from tests.helpers.trainers import ADAPTERS, SETTINGS, Recorder, digest, make_trainer

PROMPT = torch.tensor([[1, 2, 3]])


def losses(*trainers):
    """Those of each step of the trainers' runs, one run after the other."""
    found = []
    for trainer in trainers:
        trainer.add_callback(recorder := Recorder())
        trainer.train()
        trainer.remove_callback(recorder)
        found += [log["loss"] for log in recorder.logs if "loss" in log]
    return found


# ---- several trainers on one model, several runs of one trainer -----------------------------------------------------


def pairs():
    """Two trainers on one model: made by (first, second), the second from the first's model."""
    return {
        "SFT, SDFT": (
            lambda m: make_trainer(model=m, config=SFTConfig),
            lambda first: make_trainer(model=first.model),
        ),
        "SDFT, SDFT": (lambda m: make_trainer(model=m, bf16=True), lambda first: make_trainer(model=first.model)),
        "full, LoRA": (lambda m: make_trainer(model=m), lambda first: make_trainer(model=first.model, lora=True)),
        "LoRA, SDFT": (
            lambda m: make_trainer(model=m, lora=True),
            lambda first: make_trainer(model=first.model, teacher_model_kind="live"),
        ),
    }


@pytest.mark.parametrize("order", pairs())
def test_a_second_trainer_trains_the_model_as_the_first_left_it(order):
    make_first, make_second = pairs()[order]
    first = make_first(tiny.llama())
    first.train()
    twin = copy.deepcopy(first.model)
    got = losses(make_second(first))
    first.model = twin  # untouched by any trainer
    assert got == losses(make_second(first))


@pytest.mark.parametrize("swapped", [pytest.param(False, marks=pytest.mark.full), True])
def test_trainers_that_were_built_before_either_trained(swapped):
    def two(model):
        made = [make_trainer(model=model, config=SFTConfig), make_trainer(model=model, bf16=True)]
        return made[::-1] if swapped else made

    together = losses(*two(tiny.llama()))
    model = tiny.llama()
    assert together == losses(two(model)[0]) + losses(two(model)[1])
    assert together[0] != together[3]


@pytest.mark.parametrize("kind, lora", [pytest.param("base", False, marks=pytest.mark.full), ("ema", True)])
def test_a_second_run_is_the_first_of_a_new_trainer(kind, lora):
    """A new teacher, optimizer and schedule; whether it was evaluated before, between and after changes nothing."""
    settings = {"teacher_model_kind": kind, "lora": lora, "lr_scheduler_type": "linear"}
    actions = ["evaluate", "train", "evaluate", "train"]
    again = lifecycle.in_turn(None, actions, **settings)
    assert again[:3] + again[4:] == lifecycle.in_turn(None, ["evaluate", "train", "train"], again=True, **settings)


def test_a_used_trainer_resumes_as_a_new_one(tmp_path):
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "save_strategy": "steps", "save_steps": 2}
    used = make_trainer(output_dir=str(tmp_path), **settings)
    whole = losses(used)
    saved = digest(used.model.parameters())
    used.add_callback(recorder := Recorder())
    used.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log["loss"] for log in recorder.logs if "loss" in log] == whole[2:]
    assert digest(used.model.parameters()) == saved


# ---- what the caller gave -------------------------------------------------------------------------------------------


def everything_about(model):
    """All that is on a model but the values of its tensors."""
    return [
        (name, {key: value for key, value in vars(module).items() if not isinstance(value, dict)},
         {key: list(value) for key, value in vars(module).items() if isinstance(value, dict)})
        for name, module in model.named_modules()
    ] + [
        model.config.to_dict(), model.generation_config.to_dict(),
        [(name, param.requires_grad) for name, param in model.named_parameters()],
    ]  # fmt: skip


@pytest.mark.parametrize("stops", [False, True])
def test_the_model_is_its_owners_outside_of_training(stops):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if stops:
                raise KeyError("on purpose")

    model = tiny.llama(attention_dropout=0.5).eval()
    for each in (model.config, model.generation_config):  # as the tokenizer's: transformers puts these right
        for name in ("eos_token_id", "pad_token_id"):
            setattr(each, name, getattr(tiny.tokenizer(), name))
    before = everything_about(model)
    trainer = make_trainer(model=model, bf16=True, activation_checkpointing=True, callbacks=[Stop()])
    assert everything_about(model) == before
    trainer.evaluate()
    assert everything_about(model) == before
    try:
        trainer.train()
    except KeyError:
        assert stops
    assert vars(model).pop("model_tags") == ["sdft"]  # it is trained by it
    assert everything_about(model) == before
    trainer.evaluate()
    pickle.loads(pickle.dumps(model))
    assert torch.equal(copy.deepcopy(model)(PROMPT).logits, model(PROMPT).logits)
    assert model.generate(PROMPT, max_new_tokens=2, do_sample=False).shape[1] > 3


def test_an_adapter_that_was_trained_is_merged_and_the_rest_trained():
    trainer = make_trainer(lora=True, bf16=True)
    trainer.train()
    expected = trainer.model.eval()(PROMPT).logits
    merged = trainer.model.merge_and_unload()
    torch.testing.assert_close(merged(PROMPT).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no trainable weights: call model.requires_grad_\(True\)"):
        make_trainer(model=merged)
    assert losses(make_trainer(model=merged.requires_grad_(True)))


def test_settings_tokenizer_adapter_callbacks_and_rows_stay_as_they_were():
    args = SDFTConfig(**SETTINGS, output_dir="unused", hub_token="hf_1")
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    callbacks, rows = [Recorder()], tiny.rows()
    dataset = Dataset.from_list(rows)
    before = args.to_dict(), tokenizer.special_tokens_map, adapter.to_dict(), list(callbacks)
    for peft_config, kind in ((adapter, "base"), (None, "live"), (adapter, "base")):
        trainer = SDFTTrainer(tiny.llama(), args, dataset, processing_class=tokenizer, callbacks=callbacks,
                              peft_config=peft_config)  # fmt: skip
        assert trainer.args.teacher_model_kind == kind and trainer.args.hub_token == "hf_1"
        assert trainer.rollouts.sampling.pad_token_id == tokenizer.eos_token_id
    assert (args.to_dict(), tokenizer.special_tokens_map, adapter.to_dict(), callbacks) == before
    assert args.hub_token == "hf_1" and tokenizer.pad_token is None and dataset.to_list() == rows


def test_a_model_with_the_adapter_of_another_trainer_inside_is_refused():
    model = tiny.llama()
    make_trainer(model=model, lora=True)
    for more in ({}, {"lora": True}):
        with pytest.raises(ValueError, match=r"adapter inside.*trainer.model.*unload\(\)"):
            make_trainer(model=model, **more)


def test_predict_is_refused():
    with pytest.raises(ValueError, match=r"predict\(\).*evaluate\(\)"):
        make_trainer().predict(Dataset.from_list(tiny.rows()))


def test_forwards_are_entered_and_left_in_any_order():
    model = tiny.llama().eval()
    plain, one, other = model(PROMPT).logits, *(completion_forward.RequestForward(model) for _ in range(2))
    ask = completion_forward.HiddenStates(torch.tensor([0]))
    for _ in range(2):
        with one, other, one:
            assert model(input_ids=PROMPT, request=ask).shape == (1, 32)
            torch.testing.assert_close(model(PROMPT).logits, plain)
        assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)


# ---- what is random, and what is trained ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without its head, which is drawn when it is loaded; an adapter that a run left, and rows."""
    folder = tmp_path_factory.mktemp("lifecycle")
    lifecycle.save_headless(folder / "headless")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    trainer = make_trainer(model=str(folder / "model"), lora=True)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.rows())))
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_two_runs_of_one_seed_are_the_same_to_the_last_bit(folder, lora):
    first, second = lifecycle.run_twice(None, model=str(folder / "headless"), lora=lora)
    assert first == second


def test_a_saved_adapter_goes_on_being_trained(folder, tmp_path):
    start = PeftModel.from_pretrained(tiny.llama(), folder / "adapter").state_dict()
    trainer = make_trainer(model=str(folder / "adapter"), teacher_model_kind="live")
    adapter = {name: value for name, value in start.items() if "lora_" in name}
    assert adapter and all(torch.equal(trainer.model.state_dict()[name], value) for name, value in adapter.items())
    trainer.train()
    trainer.save_model(str(tmp_path))
    saved = PeftModel.from_pretrained(tiny.llama(), tmp_path).state_dict()
    assert all(not torch.equal(saved[name], value) for name, value in adapter.items())
    assert all(torch.equal(saved[name], value) for name, value in start.items() if name not in adapter)


def test_a_part_of_an_adapter_that_the_user_froze_stays_frozen():
    """PEFT makes it trainable when it switches the adapter on again, after the base teacher's pass."""
    norms = []
    for kind in ("live", "base"):  # whose gradient is the same in the first step
        model = get_peft_model(tiny.llama(), ADAPTERS[True])
        for name, param in model.named_parameters():
            if "lora_A" in name:
                param.requires_grad_(False)
        trainer = make_trainer(model=model, teacher_model_kind=kind, max_steps=2, callbacks=[recorder := Recorder()])
        before = [param.requires_grad for param in model.parameters()]
        trainer.train()
        assert [param.requires_grad for param in model.parameters()] == before
        assert all(param.grad is None for name, param in model.named_parameters() if "lora_A" in name)
        norms.append(recorder.logs[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_second_adapter_beside_it_is_refused(folder, capsys):
    for model in (str(folder / "adapter"), get_peft_model(tiny.llama(), ADAPTERS[True])):
        with pytest.raises(ValueError, match="has an adapter already.*continue training.*merge_and_unload"):
            make_trainer(model=model, lora=True)
    with pytest.raises(SystemExit, match=r"adapter has an adapter already, and peft_config \(--use_peft\)"):
        train.main(["--model_name_or_path", f"{folder}/adapter", "--dataset_path", f"{folder}/rows.jsonl",
                    "--output_dir", f"{folder}/run", "--use_peft"])  # fmt: skip


def test_quantized_weights_under_a_saved_adapter_are_not_refused(folder):
    args = SDFTConfig(**SETTINGS, output_dir="unused")
    model = ModelArguments(model_name_or_path=str(folder / "adapter"), load_in_4bit=True)
    assert model.init_kwargs(args)["quantization_config"].load_in_4bit
    with pytest.raises(ValueError, match="add --use_peft"):
        ModelArguments(model_name_or_path=str(folder / "model"), load_in_4bit=True).init_kwargs(args)


def test_a_model_of_which_nothing_is_trained_is_refused(folder):
    frozen = PeftModel.from_pretrained(tiny.llama(), folder / "adapter")
    with pytest.raises(ValueError, match="no trainable weights.*is_trainable=True"):
        make_trainer(model=frozen)
    args = SFTConfig(**SETTINGS, output_dir="unused")
    made = SFTTrainer(tiny.llama().requires_grad_(False), args, processing_class=tiny.tokenizer())
    assert made.evaluate(Dataset.from_list(tiny.rows()))["eval_loss"] > 0  # it trains nothing, and need not


@pytest.mark.parametrize(
    "settings, words",
    [({"mask_truncated_completions": True}, "no token contributed"), ({"distillation_weight": 0.0}, "exactly 0")],
)
def test_a_run_that_learns_nothing_says_so_in_its_first_log_line(settings, words):
    trainer = make_trainer(max_steps=2, **settings)
    with pytest.warns(UserWarning, match=f"Up to step 1 .*{words}.*nothing was learned"):
        trainer.train()
