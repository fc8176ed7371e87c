"""The dtype that weights are loaded in without DeepSpeed, and what is trained, saved and merged of them."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sdft_ds.preview.scores import scores
from tests.helpers import tiny
from tests.helpers.trainers import ADAPTERS, Recorder, make_trainer

LORA = ADAPTERS[True]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model whose values bf16 holds, as most on the hub."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama(dtype=torch.bfloat16, tie_word_embeddings=False).save_pretrained(folder)
    return str(folder)


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=4, **settings)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "peft_config, settings, frozen",
    [
        (LORA, {}, BF16),
        (lora(use_dora=True), {}, BF16),
        (ADAPTERS["on the head"], {}, BF16),
        (LORA, {"bf16": False}, FP32),
        (LORA, {"model_init_kwargs": {"dtype": "float32"}}, FP32),
        # What these train would be in bf16 as well.
        (lora(modules_to_save=["lm_head"]), {}, FP32),
        (lora(bias="all"), {}, FP32),
        (lora(trainable_token_indices=[1, 2]), {}, FP32),
        (lora(target_parameters=["mlp.up_proj.weight"]), {}, FP32),
    ],
)
def test_what_lora_leaves_frozen_is_loaded_in_bf16_and_what_is_trained_in_fp32(saved, peft_config, settings, frozen):
    trainer = make_trainer(model=saved, peft_config=peft_config, **{"bf16": True, **settings})
    dtypes = {True: set(), False: set()}
    for param in trainer.model.parameters():
        dtypes[param.requires_grad].add(param.dtype)
    assert dtypes == {True: {FP32}, False: {frozen}}


def test_weights_that_are_all_trained_are_loaded_in_fp32(saved):
    assert {param.dtype for param in make_trainer(model=saved, bf16=True).model.parameters()} == {FP32}


RUN = {"bf16": True, "learning_rate": 1e-3, "teacher_model_kind": "ema", "teacher_sync_steps": 1}


def trained(model, folder, resume=None, peft_config=None, **settings):
    recorder = Recorder()
    trainer = make_trainer(
        model=model, peft_config=peft_config, callbacks=[recorder], output_dir=str(folder),
        **{**RUN, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, **settings},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [log["loss"] for log in recorder.logs if "loss" in log]


def test_a_run_on_a_base_in_bf16_resumes_exactly_and_its_adapter_is_saved_and_merged_in_fp32(saved, tmp_path):
    trainer, losses = trained(saved, tmp_path, peft_config=LORA)
    resumed, again = trained(saved, tmp_path, str(tmp_path / "checkpoint-2"), peft_config=LORA)
    assert again == losses[2:]
    trainer.save_model(str(tmp_path / "adapter"))
    values = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {value.dtype for value in values.values()} == {FP32}
    for (name, whole), (_, part) in zip(
        trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(whole, part), name
        if whole.requires_grad:
            assert torch.equal(whole, values[name.replace(".default", "")])
    base = AutoModelForCausalLM.from_pretrained(saved, dtype=FP32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, expected)
    continued = make_trainer(model=str(tmp_path / "adapter"), bf16=True)
    for name, param in continued.model.named_parameters():
        assert param.dtype == (FP32 if param.requires_grad else BF16)
        assert not param.requires_grad or torch.equal(param, values[name.replace(".default", "")])


def test_a_base_in_bf16_trains_as_one_in_fp32_that_autocast_casts(saved, tmp_path):
    """The same draws, hence the same rollouts while the logits agree, and losses within the rounding of bf16."""
    losses = [
        trained(saved, tmp_path / name, peft_config=LORA, save_strategy="no", generation_kwargs={"do_sample": False},
                **settings)[1]
        for name, settings in (("bf16", {}), ("fp32", {"model_init_kwargs": {"dtype": "float32"}}))
    ]  # fmt: skip
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)


@pytest.mark.parametrize("adapter", ["on the head", "head saved"])
@pytest.mark.parametrize("settings", [{}, {"rollout_backend": "continuous"}])
def test_whatever_runs_outside_of_training_runs_on_a_base_in_bf16(saved, tmp_path, adapter, settings):
    """Evaluation before training, and a preview's scores, which are not in autocast."""
    given = {"eval_strategy": "no", "per_device_eval_batch_size": 2, "output_dir": str(tmp_path), "bf16": True}
    trainer = make_trainer(model=saved, peft_config=ADAPTERS[adapter], **given, **settings)
    assert len(scores(trainer, {0: tiny.rows()[0]})) == 1
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
