"""QLoRA: gradients are those of dequantized weights, and no forward repacks the 4-bit weights.

bitsandbytes repacks them on CPUs with bf16 units only; here its modules are told that they run on one.
"""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from sdft_ds.model import export
from tests.distributed.scenarios import qlora
from tests.helpers import tiny
from tests.helpers.steps import loss_and_gradients
from tests.helpers.trainers import ADAPTERS, make_trainer

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # what can be repacked: whole blocks of 64 in a row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.llama(**SIZES).save_pretrained(path)
    return str(path)


@pytest.fixture
def bf16_units(monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def quantized(folder) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def adapted(model):
    torch.manual_seed(11)
    return get_peft_model(model, ADAPTERS[True])


def four_bit_modules(model):
    return {name: module for name, module in model.named_modules() if type(module) is bitsandbytes.nn.Linear4bit}


def test_gradients_are_those_of_dequantized_weights(folder, bf16_units):
    model, plain = quantized(folder), tiny.llama(**SIZES)
    modules = four_bit_modules(model)
    assert len(modules) == 14 and all(module.support_avx512bf16_for_cpu for module in modules.values())
    bytes_before = {name: module.weight.data.clone() for name, module in modules.items()}
    for name, module in modules.items():
        plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    settings = {"per_device_train_batch_size": 4, "teacher_model_kind": "base"}
    got, expected = (loss_and_gradients(make_trainer(model=adapted(each), **settings)) for each in (model, plain))
    assert got[0] == pytest.approx(expected[0], rel=1e-4)
    assert got[1].keys() == expected[1].keys() and len(got[1]) == 28
    for name, gradient in got[1].items():
        if "lora_B" in name:  # lora_A has no gradient at the start
            assert torch.cosine_similarity(gradient.flatten(), expected[1][name].flatten(), dim=0) > 0.999, name
    for name, module in modules.items():
        assert torch.equal(module.weight.data, bytes_before[name]), name


def test_weights_that_were_repacked_before_are_refused(folder, bf16_units):
    model = quantized(folder).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj(torch.ones(1, 64))
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.* were repacked.*reload the model"):
        make_trainer(model=model, lora=True)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.full), 3])
def test_sharded_weights_are_not_repacked(folder, two_ranks, stage):
    """Two ranks that roll out, score, train and evaluate: the losses of one process, and the weights as loaded."""
    alone = qlora.train_in_four_bits(None, folder, per_device_train_batch_size=4)
    for rank in two_ranks.run(qlora.train_in_four_bits, stage, folder):
        assert rank["weights"] == alone["weights"]
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-4, atol=1e-6)


def test_weights_for_another_engine_are_dequantized_and_merged(folder):
    model = adapted(quantized(folder))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.1)
    groups = export.whole_weights(model, model, torch.float32, with_tied_head=False)
    got = {name: tensor for group in groups for name, tensor in group}
    lm = model.get_base_model()
    assert got.keys() == tiny.llama(**SIZES).state_dict().keys() - {"lm_head.weight"}
    for name in four_bit_modules(model):
        layer = model.get_submodule(name.removesuffix(".base_layer"))
        base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        assert delta.abs().max() > 0
        torch.testing.assert_close(got[f"{plain}.weight"], base + delta, rtol=0, atol=1e-5)
    assert got["model.norm.weight"].equal(lm.model.norm.weight)
