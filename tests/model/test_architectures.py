"""Tiny random models of many architectures: the loss in chunks is the plain one, and two steps train."""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
)

from sdft_ds.model import completion_forward
from tests.helpers import tiny
from tests.helpers.steps import check_against_the_reference
from tests.helpers.trainers import make_trainer, train

SIZES = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2,
         "max_position_embeddings": 512, "pad_token_id": 0}  # fmt: skip
DECODER = {**SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
# Windows shorter than a prompt, yet long enough to see the context.
LOCAL = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama, tied": LlamaConfig(**DECODER, tie_word_embeddings=True),
    "llama, untied": LlamaConfig(**DECODER),
    "qwen2": Qwen2Config(**DECODER),
    "qwen3": Qwen3Config(**DECODER, head_dim=8),
    "qwen3_5, linear attention": Qwen3_5TextConfig(**DECODER, **LINEAR, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**DECODER, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "mixtral, window": MixtralConfig(**DECODER, num_local_experts=4, sliding_window=24),
    "gpt_oss": GptOssConfig(**DECODER, **LOCAL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "gemma2, softcap": Gemma2Config(**DECODER, **LOCAL, head_dim=8, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**DECODER, **LOCAL, head_dim=8),
    "mistral, window": MistralConfig(**DECODER, sliding_window=24),
    "phi3": Phi3Config(**DECODER),
    "olmo2": Olmo2Config(**DECODER),
    "granite, scaled": GraniteConfig(**DECODER, logits_scaling=3.0),
    "cohere, scaled": CohereConfig(**DECODER, logit_scale=0.25),
    "smollm3": SmolLM3Config(**DECODER),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48, num_attention_heads=4),
    "gpt2": GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2),
    "falcon_h1, attention beside Mamba": FalconH1Config(
        **DECODER, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
    ),
    "mamba": MambaConfig(**{**SIZES, "initializer_range": 1.0}, state_size=8),
}


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_step_is_that_of_the_plain_loop_and_two_train(config):
    settings = {"num_loss_tokens_to_skip": 1, "distillation_alpha": 0.5, "distillation_topk": 20}
    check_against_the_reference(make_trainer(model=model_of(config), **settings), within=1e-4)
    result = train(model=model_of(config), max_steps=2, **settings)
    assert len(result["losses"]) == 2 and all(map(math.isfinite, result["losses"])) and result["losses"][0] > 0


SWITCH = 64  # most of the contexts of tiny.rows are longer, with a completion of 8
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
LENGTH_DEPENDENT = {
    "longrope": Phi3Config(**DECODER, original_max_position_embeddings=SWITCH, rope_parameters=LONGROPE),
    "dynamic": LlamaConfig(
        **{**DECODER, "max_position_embeddings": SWITCH}, rope_parameters={"rope_type": "dynamic", "factor": 4.0}
    ),
}


@pytest.mark.parametrize("config", LENGTH_DEPENDENT.values(), ids=LENGTH_DEPENDENT.keys())
def test_rows_stay_below_the_length_at_which_rotary_factors_change(config):
    """Whether prompts are shared, and however rows are batched, each is rotated as it is by itself."""
    with pytest.warns(UserWarning, match="rows 0 are dropped, 0 lose .* 3 the end of the context"):
        trainer = make_trainer(model=model_of(config), per_device_train_batch_size=12, distillation_topk=20)
    check_against_the_reference(trainer, within=1e-4)
    rollouts = [rollout for scored in trainer.current_batch.scored for rollout in scored.batch.rollouts]
    assert max(len(r.prompts.teacher.ids) + len(r.completion.ids) for r in rollouts) == SWITCH
    with pytest.raises(ValueError, match=f"max_teacher_prompt_length=60 and .* exceed the.*{SWITCH}"):
        make_trainer(model=model_of(config), max_teacher_prompt_length=60)


def test_equal_rotary_factors_set_no_limit():
    same = LONGROPE | {"short_factor": LONGROPE["long_factor"]}
    config = Phi3Config(**DECODER, original_max_position_embeddings=SWITCH, rope_parameters=same)
    trainer = make_trainer(model=model_of(config), per_device_train_batch_size=12, distillation_topk=20)
    check_against_the_reference(trainer, within=1e-4)
    assert max(len(r.prompts.teacher.ids) for r in trainer.current_batch.scored[0].batch.rollouts) > SWITCH


def test_the_loss_of_routers_is_told_to_be_left_out():
    config = CONFIGS["mixtral, window"].to_dict() | {"output_router_logits": True}
    with pytest.warns(UserWarning, match="load-balancing loss is not added"):
        trainer = make_trainer(model=model_of(MixtralConfig(**config)), distillation_topk=20)
    check_against_the_reference(trainer, within=1e-4)


def test_the_text_model_of_a_checkpoint_with_images_trains(tmp_path):
    """Loaded by name it is the causal LM; what is saved loads as such."""
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    whole = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config={**DECODER, **LINEAR, "head_dim": 8}, vision_config=vision)
    )
    whole.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer(model=str(tmp_path / "model"), max_steps=1)
    assert type(trainer.model).__name__ == "Qwen3_5ForCausalLM"
    start = whole.model.language_model.embed_tokens.weight
    torch.testing.assert_close(trainer.model.get_input_embeddings().weight, start)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.get_input_embeddings().weight, trainer.model.get_input_embeddings().weight)
    assert not torch.equal(loaded.get_input_embeddings().weight, start)


T5 = T5Config(vocab_size=264, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
BERT = BertConfig(vocab_size=264, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    initializer_range=1.0)  # fmt: skip


@pytest.mark.parametrize(
    "model, message",
    [
        (T5ForConditionalGeneration(T5), "T5ForConditionalGeneration is an encoder-decoder model"),
        (BertModel(BERT), "BertModel has no language-model head"),
        (torch.nn.Linear(2, 2), "Linear has no language-model head"),
    ],
    ids=["encoder-decoder", "no head", "no model"],
)
def test_other_kinds_of_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model=model)


@pytest.mark.parametrize(
    "config, message",
    [(T5, r"model \(t5\) is an encoder-decoder model"), (ViTConfig(), r"model \(vit\) has no language-model head")],
    ids=["encoder-decoder", "no head"],
)
def test_they_are_refused_before_their_weights_are_looked_for(tmp_path, config, message):
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        make_trainer(model=str(tmp_path / "model"))


def test_a_model_whose_tokens_see_what_comes_after_them_is_refused():
    model = AutoModelForCausalLM.from_config(BERT)
    with completion_forward.RequestForward(model), pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        completion_forward.check(model, model, torch.device("cpu"))
