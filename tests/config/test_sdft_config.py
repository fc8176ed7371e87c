import dataclasses
import os
import re
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sdft_ds import SDFTConfig
from sdft_ds.config.fields import own_fields
from sdft_ds.distributed import launch
from tests.helpers import tiny


def config(tmp_path="unused", **settings):
    return SDFTConfig(output_dir=str(tmp_path), report_to="none", **settings)


# The interface that scripts rely on: names and defaults.
DEFAULTS = {
    "distillation_alpha": 0.5, "distillation_topk": 100, "full_logit_distillation": False,
    "distillation_add_tail": False, "distillation_is_clip": 2.0, "distillation_weight": 1.0, "loss_type": "dapo",
    "num_loss_tokens_to_skip": 0, "generate_from_teacher": False,
    "teacher_prompt_template": "{prompt}\n\n{privileged_context}", "disable_dropout": True, "sync_ref_model": False,
    "ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6, "max_prompt_length": 512, "max_completion_length": 256,
    "num_generations": 8, "num_generations_eval": None, "num_iterations": 1, "temperature": 1.0, "top_p": 1.0,
    "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "cache_implementation": None, "generation_kwargs": None,
    "chat_template_kwargs": None, "ds3_gather_for_generation": True, "shuffle_dataset": True,
    "model_init_kwargs": None, "remove_unused_columns": False, "mask_truncated_completions": False, "use_vllm": False,
    "logging_steps": 10, "bf16": True, "activation_checkpointing": True, "truncation": "truncate",
    "teacher_model_kind": None, "max_teacher_prompt_length": None,
}  # fmt: skip


def test_defaults():
    made = config()
    assert {name: getattr(made, name) for name in DEFAULTS} == DEFAULTS
    assert made.steps_per_generation == 1 and made.generation_batch_size == 8
    assert made.distillation_mode == "topk_logits"
    assert made.teacher_update_rate == 0.6 and made.teacher_sync_steps == 512


def test_precision_and_checkpointing_can_be_said_in_old_and_new_names(monkeypatch):
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr("sdft_ds.distributed.launch.no_accelerator", lambda: False)
        assert not config(fp16=True).bf16
    assert config(bf16=False).bf16 is False
    with pytest.warns(FutureWarning):
        assert not config(gradient_checkpointing=False).activation_checkpointing
    assert not config(activation_checkpointing=False).activation_checkpointing


@pytest.mark.parametrize("name", [f.name for f in own_fields(SDFTConfig) if "unused" in f.metadata])
def test_fields_without_a_use_are_refused_elsewhere_than_at_their_default(name):
    field = SDFTConfig.__dataclass_fields__[name]
    assert getattr(config(**{name: field.default}), name) == field.default
    other = {bool: True, int: 77, float: 0.77}.get(type(field.default), "else")
    with pytest.raises(ValueError, match=f"{name}=.* would have no effect here: .*Leave it at its default"):
        config(**{name: other})


def test_noise_that_the_student_alone_would_see_is_refused():
    with pytest.raises(ValueError, match="neftune_noise_alpha.*noise that its teacher does not. Leave it unset"):
        config(neftune_noise_alpha=5.0)


@pytest.mark.parametrize(
    "settings, mode, topk",
    [
        ({}, "topk_logits", 100),
        ({"full_logit_distillation": True}, "topk_logits", 100),
        ({"distillation_topk": None, "full_logit_distillation": True}, "full_logits", None),
        ({"distillation_topk": None, "distillation_alpha": 1.0}, "sampled_token", None),
        ({"distillation_mode": "full_logits"}, "full_logits", None),
        ({"distillation_mode": "topk_logits", "distillation_topk": 7}, "topk_logits", 7),
        ({"distillation_mode": "sampled_token", "distillation_alpha": 1.0}, "sampled_token", None),
    ],
)
def test_support_in_old_and_new_names(settings, mode, topk):
    made = config(**settings)
    assert (made.distillation_mode, made.distillation_topk) == (mode, topk)
    assert made.divergence.mode == mode and made.divergence.topk == topk


@pytest.mark.parametrize(
    "settings, kind, rate, steps",
    [
        ({}, None, 0.6, 512),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 0.1, "ref_model_sync_steps": 3}, "ema", 0.1, 3),
        ({"teacher_model_kind": "ema", "teacher_update_rate": 0.01, "teacher_sync_steps": 1}, "ema", 0.01, 1),
        ({"teacher_model_kind": "base"}, "base", 0.6, 512),
    ],
)
def test_teacher_in_old_and_new_names(settings, kind, rate, steps):
    made = config(**settings)
    assert (made.teacher_model_kind, made.teacher_update_rate, made.teacher_sync_steps) == (kind, rate, steps)
    assert (made.ref_model_mixup_alpha, made.ref_model_sync_steps) == (rate, steps)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"distillation_topk": None}, "sampled token.*distillation_alpha=1"),
        ({"distillation_mode": "sampled_token"}, "distillation_alpha=1"),
        ({"distillation_mode": "topk_logits", "distillation_topk": None}, "needs distillation_topk"),
        ({"distillation_mode": "full_logits", "distillation_topk": 5}, "distillation_topk=5 contradicts"),
        ({"distillation_mode": "sampled_token", "full_logit_distillation": True, "distillation_alpha": 1.0},
         "contradicts full_logit_distillation"),
        ({"distillation_mode": "full_logits", "distillation_add_tail": True}, "distillation_add_tail.*no effect"),
        ({"sync_ref_model": True, "teacher_model_kind": "base"}, "sync_ref_model.*contradicts"),
        ({"teacher_update_rate": 0.1, "ref_model_mixup_alpha": 0.2}, "contradicts ref_model_mixup_alpha"),
        ({"teacher_sync_steps": 4, "ref_model_sync_steps": 5}, "contradicts ref_model_sync_steps"),
        ({"teacher_model_kind": "other"}, "teacher_model_kind must be one of"),
        ({"distillation_alpha": 1.5}, "distillation_alpha must be in"),
        ({"distillation_topk": 0}, "distillation_topk must be positive"),
        ({"loss_type": "mean"}, "loss_type must be one of"),
        ({"truncation": "cut"}, "truncation must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_generations": 0}, "num_generations must be at least 1"),
        ({"teacher_prompt_template": "{prompt}"}, "lacks the placeholder {privileged_context}"),
        ({"num_generations": 3}, "num_generations=3 does not divide"),
        ({"generation_batch_size": 12}, "must be a multiple of the 8 rows"),
        ({"generation_batch_size": 16, "steps_per_generation": 3}, "contradicts steps_per_generation=3"),
        ({"eval_strategy": "steps", "eval_steps": 5, "num_generations_eval": 3}, "num_generations_eval=3"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6}, "straddle.*steps_per_generation=4 or 8"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 3}, "straddle"),
        ({"temperature": float("inf")}, "temperature must be a finite number, not inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"bad_rows": "drop"}, "bad_rows must be one of error, skip"),
        ({"max_bad_rows": -1}, "max_bad_rows must be at least 0"),
        ({"rollout_batch_tokens": 0}, "rollout_batch_tokens must be positive or None, not 0"),
        ({"fp16": True, "use_cpu": True}, "fp16=True needs a GPU"),
        ({"num_loss_tokens_to_skip": 9, "max_completion_length": 9}, "num_loss_tokens_to_skip=9 leaves nothing"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True is not supported"),
        ({"generation_kwargs": "{bad"}, "generation_kwargs must be a JSON object"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs must be a JSON object, not list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' is set by sdft_ds itself"),
        ({"teacher_chat_template_kwargs": "[1]"}, "teacher_chat_template_kwargs must be a JSON object, not list"),
        ({"teacher_chat_template_kwargs": {"tokenize": True}}, "teacher_chat_template_kwargs: 'tokenize' is set by"),
        ({"generation_kwargs": {"typical": 0.9}}, "has no 'typical'; did you mean 'typical_p'"),
        ({"generation_kwargs": {"max_new_tokens": 9}}, "has a setting of its own: max_completion_length"),
        ({"model_init_kwargs": {"token": "hf_secret"}}, "model_init_kwargs: 'token' would be saved.*HF_TOKEN"),
        ({"teacher_prompt_template": None}, "teacher_prompt_template must be a text, not NoneType"),
    ],
)  # fmt: skip
def test_refusals_name_the_field_and_the_remedy(settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def test_dict_fields_are_accepted_as_json():
    made = config(generation_kwargs='{"typical_p": 0.9}', chat_template_kwargs='{"enable_thinking": false}')
    assert made.generation_options["typical_p"] == 0.9 and made.chat_template_kwargs == {"enable_thinking": False}


def test_a_resolved_configuration_can_be_rebuilt():
    made = config(gradient_accumulation_steps=2, teacher_update_rate=0.1, distillation_mode="full_logits")
    again = dataclasses.replace(made, learning_rate=1.0)
    assert again.divergence == made.divergence and again.generate_every == made.generate_every


def test_steps_per_generation_from_the_generation_batch_size():
    made = config(generation_batch_size=32, num_iterations=2)
    assert made.steps_per_generation == 4 and made.generate_every == 8


def test_continuous_batching_needs_whole_weights_and_its_own_cache():
    with pytest.raises(ValueError, match="leave ds3_gather_for_generation=True"):
        config(rollout_backend="continuous", ds3_gather_for_generation=False)
    with pytest.raises(ValueError, match="contradicts cache_implementation='static'"):
        config(rollout_backend="continuous", cache_implementation="static")


def test_rows_may_change_places_within_an_optimizer_step_only():
    assert config(gradient_accumulation_steps=4).reordered_batches == 4
    assert config(gradient_accumulation_steps=2, steps_per_generation=4).reordered_batches == 2
    assert config(gradient_accumulation_steps=4, steps_per_generation=2).reordered_batches == 2
    assert config(gradient_accumulation_steps=4, loss_type="bnpo").reordered_batches == 1


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"teacher_update_rate": 0.1}, "teacher_update_rate=0.1 has no effect: the teacher is live or base, not ema"),
        ({"teacher_model_kind": "base", "ref_model_sync_steps": 3}, "teacher_sync_steps=3 .*teacher is base"),
        ({"teacher_model_kind": "live", "teacher_shadow_device": "cpu"}, "teacher_shadow_device='cpu' has no effect"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation=False .*not ZeRO-3"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers=2 has no effect"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True has no effect"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
    ],
)
def test_settings_that_change_nothing_are_warned_about(settings, words):
    with pytest.warns(UserWarning, match=words):
        config(**settings)


def test_the_defaults_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config()


@pytest.mark.parametrize("metric, greater", [
    ("eval_tasks/retention/kl_to_start", False), ("eval_tasks/new/clipped_share", False), ("loss", False),
    ("eval_a_divergence/p90", False), ("eval_tasks/new/accuracy", True), ("eval_completions/mean_length", True),
])  # fmt: skip
def test_whether_more_of_the_metric_for_the_best_model_is_better(metric, greater):
    assert config(metric_for_best_model=metric).greater_is_better is greater
    assert config(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


@pytest.mark.parametrize("alpha, words", [
    (0.01, r"alpha \(1 - alpha\) = 0.0099 .*distillation_alpha=0, which is the forward KL"),
    (0.95, r"= 0.048 .*distillation_alpha=1, which is the reverse KL"),
    (0.0, None), (0.1, None), (0.5, None), (0.9, None), (1.0, None),
])  # fmt: skip
def test_a_divergence_that_starves_the_gradient_is_warned_about(alpha, words):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        config(distillation_alpha=alpha)
    found = [str(each.message) for each in told if "distillation_alpha" in str(each.message)]
    assert [re.search(words, text) is not None for text in found] == [True] if words else not found


def test_cudnns_attention_is_off(tmp_path, monkeypatch):
    """It plans anew for every shape, and every decoded token has another."""
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    SDFTConfig(output_dir=str(tmp_path), report_to="none")
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    assert os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Settings as on a GPU, as far as they are not the device's."""
    allocator, precision = torch._C._accelerator_getAllocatorSettings(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(launch, "no_accelerator", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for name in launch.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch._C._accelerator_setAllocatorSettings(allocator or "expandable_segments:False")
    torch.set_float32_matmul_precision(precision)


def test_memory_is_allocated_in_segments_that_grow(as_on_a_gpu, monkeypatch, tmp_path):
    made = {"output_dir": str(tmp_path), "report_to": "none"}
    for settings, expected in [
        ({}, "expandable_segments:True"),
        ({"use_vllm": True}, "expandable_segments:False"),  # whose sleep mode cannot work with them
        ({"use_vllm": True, "vllm_mode": "server"}, "expandable_segments:True"),
    ]:
        SDFTConfig(**made, **settings)
        assert torch._C._accelerator_getAllocatorSettings() == expected
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    SDFTConfig(**made)
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:False"


def test_what_is_still_fp32_is_multiplied_in_tf32(as_on_a_gpu, tmp_path):
    made = {"output_dir": str(tmp_path), "report_to": "none"}
    for settings, expected in [
        ({}, "high"),
        ({"bf16": False}, "highest"),
        ({"fp16": True}, "high"),
        ({"trust_remote_code": True}, "highest"),
        ({"use_cpu": True}, "highest"),  # left alone
    ]:
        SDFTConfig(**made, **settings)
        assert torch.get_float32_matmul_precision() == expected, settings
    torch.set_float32_matmul_precision("highest")
    SDFTConfig(**made, tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"


def test_positions_are_not_multiplied_as_matrices():
    """TF32 cannot hold those above 2048."""
    rotary = LlamaRotaryEmbedding(tiny.llama().config)
    ops = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ops.append(function.name())
            return function(*args, **(kwargs or {}))

    with Recorded():
        rotary(torch.zeros(1), torch.arange(4)[None])
    assert ops and not any("mm" in name for name in ops)
