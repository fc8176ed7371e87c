"""Merging an adapter: the saved model computes what the adapted one does, whatever is adapted, or is not saved."""

import copy
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from sdft_ds import merge as merging
from sdft_ds import model_card
from sdft_ds.merge import merge
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer
from tests.test_model_card import facts

LINEAR = {"target_modules": "all-linear"}
METHODS = {
    "plain": LoraConfig(**LINEAR),
    "rslora": LoraConfig(**LINEAR, use_rslora=True, r=4, lora_alpha=32),
    "dora": LoraConfig(**LINEAR, use_dora=True),
    "bias": LoraConfig(target_modules=["q_proj"], bias="all"),
    "ranks": LoraConfig(**LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 64}),
    "head": LoraConfig(target_modules=["lm_head", "q_proj"]),
    "embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "both": LoraConfig(target_modules=["embed_tokens", "lm_head"]),
    "tied": LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "saved head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved embedding": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both saved": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [70, 71]}),
    "only tokens": TrainableTokensConfig(token_indices=[70, 71]),
    "pissa": LoraConfig(**LINEAR, init_lora_weights="pissa"),
    "olora": LoraConfig(**LINEAR, init_lora_weights="olora"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=["q_proj", "up_proj"]),
    "vera": VeraConfig(target_modules=["q_proj"]),
    "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
}  # fmt: skip
FAST = {"plain", "dora", "head", "embedding", "tied", "saved head", "tokens"}
IDS = torch.arange(60, 90)[None]


def saved_adapter(folder, config, base=None, seed=3):
    """An adapter with random weights, beside the model that it is of. Returns the adapted model's logits."""
    base = tiny.llama() if base is None else base
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(base, copy.deepcopy(config)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
        logits = model(input_ids=IDS).logits
    model.save_pretrained(folder / "run")
    tiny.tokenizer().save_pretrained(folder / "run")
    return logits


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(
    "name, tied",
    [
        pytest.param(
            name, tied, id=f"{name}-{tied}", marks=() if tied and name in FAST or name == "plain" else pytest.mark.full
        )
        for name in METHODS
        for tied in (True, False)
    ],
)
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path, name, tied):
    expected = saved_adapter(tmp_path, METHODS[name], tiny.llama(tie_word_embeddings=tied))
    compared = merge(tmp_path / "run", tmp_path / "merged")
    assert compared.same == merging.ANSWER_LENGTH and compared.difference < 1e-5 < 0.001 < compared.effect
    model = loaded(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    untied = not tied or name in ("head", "embedding", "both", "saved head", "saved embedding")
    assert model.config.tie_word_embeddings is not untied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not untied
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.full
def test_experts_are_merged_and_saved_as_the_hub_names_them(tmp_path):
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2))
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    expected = saved_adapter(tmp_path, config, base)
    merge(tmp_path / "run", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "merged")(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("base", "merged")]
    assert names[0] == names[1]


def test_weights_that_were_quantized_in_training_are_merged_dequantized(tmp_path):
    """The logits are those of the model in training, not of its adapter on the weights before they were quantized."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    tiny.llama(**sizes).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    in_four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    trainer = make_trainer(
        model=str(tmp_path / "base"), lora=True, model_init_kwargs={"quantization_config": in_four_bits}, max_steps=2,
        learning_rate=0.1, output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=IDS).logits
    compared = merge(tmp_path / "run" / "checkpoint-2", tmp_path / "merged")
    assert compared.difference < 1e-4
    model = loaded(tmp_path / "merged")
    assert not getattr(model, "is_quantized", False) and model.dtype == torch.float32
    with torch.no_grad():
        got = model(input_ids=IDS).logits
        before = PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "run/checkpoint-2")(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 0.05


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an adapter and its model."""
    folder = tmp_path_factory.mktemp("trained")
    saved_adapter(folder, LoraConfig(target_modules=["q_proj", "up_proj"]))
    return folder


def test_what_goes_along(trained, tmp_path, capsys):
    config = GenerationConfig.from_pretrained(trained / "base", eos_token_id=[256, 257], top_p=0.5, do_sample=True)
    model = trained / "base"
    config.save_pretrained(model)
    merging.main([str(trained / "run"), str(tmp_path / "new" / "merged"), "--dtype", "bfloat16"])
    out = tmp_path / "new" / "merged"
    said = capsys.readouterr().out
    assert (
        "of 24 positions of an answer the likeliest token is the same" in said
        and "10.0% is the limit in bfloat16" in said
    )
    assert f"vllm serve {out}" in said
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE and tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    saved = GenerationConfig.from_pretrained(out)
    assert (saved.eos_token_id, saved.top_p, saved.do_sample) == ([256, 257], 0.5, True)
    assert loaded(out).dtype == torch.bfloat16
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "merged into the weights" in card.text
    assert str(trained) not in card.content


def test_the_card_of_a_run_is_kept(tmp_path):
    of_run = model_card.render(facts(adapter=True, license="mit"))
    card = ModelCard(model_card.render_merged("merged", "org/base", "LORA", "logits are equal", of_run))
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("transformers", "org/base", "mit")
    assert "# merged\n" in card.text and "Trained: an adapter (LORA), merged into the weights" in card.text
    assert "## Settings" in card.text and "logits are equal" in card.text


def test_an_existing_folder_is_not_overwritten(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists already: choose another folder"):
        merge(trained / "run", tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "notes.txt"]


@pytest.mark.parametrize(
    "found, words",
    [
        ([], "has neither an adapter nor a model: give the output_dir of a run"),
        (["model.safetensors"], "has no adapter: all weights were trained, and {run} is the model to serve"),
        (["checkpoint-2/model.safetensors"], "all weights are trained, and the newest model is {run}/checkpoint-2"),
        (["checkpoint-2/adapter_config.json"], "has no adapter, but {run}/checkpoint-2 has one: give that folder"),
        (["mine/adapter_config.json"], "has no adapter, but {run}/mine has one"),
        (None, "there is no such folder"),
    ],
)
def test_nothing_to_merge(tmp_path, found, words):
    run = tmp_path / "run"
    for name in found or ():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    if found == []:
        run.mkdir()
    with pytest.raises(ValueError, match=re.escape(words.format(run=run))):
        merge(run, tmp_path / "out")


def changed(trained, tmp_path, **changes):
    """A copy of the adapter with another adapter_config.json."""
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return tmp_path / "run"


def test_a_model_that_has_moved(trained, tmp_path):
    run = changed(trained, tmp_path, base_model_name_or_path="/nowhere/base")
    with pytest.raises(ValueError, match="The base model of .*run is /nowhere/base, .* give its place as --base"):
        merge(run, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    assert merge(run, tmp_path / "out", base=str(trained / "base")).same == merging.ANSWER_LENGTH


def test_another_models_adapter_is_refused(trained, tmp_path):
    tiny.llama(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "shallower")
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "wider")
    for name in ("deeper", "shallower", "wider"):
        with pytest.raises(ValueError, match=f"The adapter in .*run is not one of .*{name}"):
            merge(trained / "run", tmp_path / "out", base=str(tmp_path / name))
    assert not list(tmp_path.glob("out*"))


def test_learned_prompts_are_refused(tmp_path):
    get_peft_model(tiny.llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "run"
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING learns tokens before the prompt, not weights"):
        merge(tmp_path / "run", tmp_path / "out")


def test_a_full_disk(trained, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="the model needs 0.0 GB, and 0.0 GB are free"):
        merge(trained / "run", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_merged_wrongly_is_not_saved(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "_merged", lambda model: model.unload())
    with pytest.raises(ValueError, match="the merged model is not the adapted one, and was not saved"):
        merge(trained / "run", tmp_path / "out")
    assert not list(tmp_path.iterdir())
