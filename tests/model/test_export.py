import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from sdft_ds.model import export
from tests.helpers import tiny


def exported(model, dtype=torch.float32, with_tied_head=False):
    return {
        name: tensor for group in export.whole_weights(model, model, dtype, with_tied_head) for name, tensor in group
    }


def test_a_tied_head_is_left_out_or_given_as_weights_of_its_own():
    model = tiny.llama()
    assert "lm_head.weight" not in exported(model)
    with_head = exported(model, with_tied_head=True)
    assert torch.equal(with_head["lm_head.weight"], with_head["model.embed_tokens.weight"])
    assert "lm_head.weight" in exported(tiny.llama(tie_word_embeddings=False))


def test_copies_in_the_dtype_of_the_engine():
    model = tiny.llama()
    got = exported(model, torch.bfloat16)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    own = exported(model)["model.norm.weight"]
    own.zero_()
    assert model.model.norm.weight.abs().sum() > 0


def test_a_decoder_layer_at_a_time():
    model = tiny.llama(num_hidden_layers=3)
    groups = [[name for name, _ in group] for group in export.whole_weights(model, model, torch.float32, False)]
    layers = [group for group in groups if "layers" in group[0]]
    assert len(layers) == 3 and all(len({name.split(".")[2] for name in group}) == 1 for group in layers)


def test_experts_have_the_names_and_shapes_of_the_files(tmp_path):
    """In memory the experts of a layer are one tensor; its files have one for each."""
    from safetensors.torch import load_file

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved, got = load_file(tmp_path / "model.safetensors"), exported(model)
    assert got.keys() == saved.keys() and len([name for name in got if "experts" in name]) >= 2 * 2 * 3
    for name, tensor in saved.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weights"),
        ({"target_modules": ["lm_head"]}, "on the head or the embedding"),
        ({"target_modules": ["embed_tokens"]}, "on the head or the embedding"),
    ],
    ids=str,
)
def test_why_an_adapter_cannot_be_served_by_itself(changes, reason):
    model = get_peft_model(tiny.llama(), LoraConfig(**{"target_modules": ["q_proj"], **changes}))
    assert reason in export.adapter_obstacle(model)


def test_an_adapter_that_can_be_served_by_itself(tmp_path):
    from safetensors.torch import load_file

    assert "no adapter" in export.adapter_obstacle(tiny.llama())
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear"))
    assert export.adapter_obstacle(model) is None
    model.save_pretrained(tmp_path)
    saved, got = load_file(tmp_path / "adapter_model.safetensors"), export.adapter_weights(model, model)
    assert got.keys() == saved.keys() and all(torch.equal(got[name], saved[name]) for name in saved)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert "weights beside the adapter are trained" in export.adapter_obstacle(model)


@pytest.mark.parametrize(
    "config, match",
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_bias"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "merges LoRA adapters only"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_name(config, match):
    with pytest.raises(ValueError, match=match):
        export.refuse_unmergeable(get_peft_model(tiny.llama(), config))
    export.refuse_unmergeable(get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear")))
