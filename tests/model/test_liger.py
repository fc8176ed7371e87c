"""Liger's kernels, which run on GPUs only: what they replace, and when. The last test needs liger-kernel installed."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from sdft_ds.config import inherited
from sdft_ds.distributed import launch
from sdft_ds.model import loading
from sdft_ds.model.completion_forward import PLAIN_FORWARD, causal_lm_of
from tests.helpers import tiny
from tests.helpers.trainers import ADAPTERS, make_trainer

HEADS_OFF = {"fused_linear_cross_entropy": False, "cross_entropy": False}


@pytest.fixture
def installed(monkeypatch):
    """A GPU and a liger-kernel for Llama, as far as settings see; what it was asked to apply, and whether the model's
    forward was ours then."""
    applied = []

    def apply(model, kernel_config):
        applied.append((dict(kernel_config), PLAIN_FORWARD in vars(causal_lm_of(model))))

    kernels = types.ModuleType("liger_kernel.transformers.monkey_patch")
    kernels.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(inherited, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(launch, "no_accelerator", lambda: False)
    monkeypatch.setattr(loading, "apply_liger_kernel", apply)
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    return applied


@pytest.mark.parametrize("lora", [False, True])
def test_kernels_are_applied_before_the_first_rollout_and_without_its_head(installed, lora):
    trainer = make_trainer(lora=lora, use_liger_kernel=True, liger_kernel_config={"rope": False}, max_steps=1)
    assert installed == [({"rope": False, **HEADS_OFF}, False)]
    trainer.train()  # where transformers applies them again, before the engine is made
    assert all(kernels == {"rope": False, **HEADS_OFF} for kernels, _ in installed)


def test_a_model_without_kernels_is_refused_by_name(installed):
    model = tiny.llama()
    model.config.model_type = "unheard_of"
    with pytest.raises(ValueError, match="no kernels for unheard_of models"):
        make_trainer(model=model, use_liger_kernel=True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(inherited, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="needs liger-kernel, which is not installed: pip install liger-kernel"):
        inherited._without_ligers_heads(SimpleNamespace(liger_kernel_config=None, use_cpu=False))


@pytest.mark.parametrize("lora", [False, True])
def test_ligers_own_code_takes_norms_and_mlps_and_leaves_the_head(monkeypatch, lora):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # replaced for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model, own = tiny.llama(), modeling_llama.LlamaForCausalLM.forward
    cross_entropy = torch.nn.functional.cross_entropy
    wrapped = get_peft_model(model, ADAPTERS[True]) if lora else model
    settings = SimpleNamespace(use_liger_kernel=True, liger_kernel_config=None, use_cpu=False)
    settings.liger_kernel_config = inherited._without_ligers_heads(settings)
    loading.check_kernels(model.config, settings)
    loading.apply_kernels(wrapped, settings)
    layer = model.model.layers[0]
    assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
    assert layer.input_layernorm.forward.__func__ is LigerRMSNorm.forward
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert "forward" not in vars(model) and type(model).forward is own
    assert "forward" not in vars(model.lm_head) and torch.nn.functional.cross_entropy is cross_entropy
