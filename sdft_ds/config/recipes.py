"""Recipes: named presets of settings. Explicitly set values override them."""

from typing import Any

# The recipe's template already introduces the demonstration, so its demonstration_template is the bare response.
PAPER_TEMPLATE = (
    "{prompt}\n\nBelow is a response to this question that shows what a good one looks like:\n\n{privileged_context}"
    "\n\nNow give a response of your own: think it through, and say it in your own words."
)

# Of those of benchmarks.templates the one after which SmolLM2-135M says most often what the context says, also after
# beginnings of its own: docs/learning.md.
FACTS_TEMPLATE = "{prompt}\n\n{privileged_context}\n\nRepeat this word for word."
# Learning rate of full fine-tuning at this hidden size; see learning_rate_for.
RATE, RATE_WIDTH, RATE_OF_ADAPTER, RATE_OF_GEMMA = 1e-4, 576, 10, 1 / 5

# name -> settings of SDFTConfig.
RECIPES: dict[str, dict[str, Any]] = {
    # What taught SmolLM2-135M most facts in few steps and forgot least: benchmarks/README.md, "A small real model".
    "facts": {
        "distillation_alpha": 0.0,
        "distillation_mode": "full_logits",
        "teacher_model_kind": "base",
        # Mean over the tokens of each completion, then over completions.
        "loss_type": "grpo",
        # As many prompts a step as possible.
        "num_generations": 1,
        # At top_p 1 a small model's rollouts seldom come to the point.
        "top_p": 0.6,
        # The teacher's prompt shows the answer early on, the student's what it would say itself.
        "teacher_rollout_fraction": 1.0,
        "teacher_prompt_template": FACTS_TEMPLATE,
        # A small teacher is half sure of what it was shown; its likeliest tokens are what is to be learned.
        "teacher_temperature": 0.5,
        # On the command line for the model's width: see learning_rate_for.
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
    },
    # The paper (arXiv 2601.19897) and its public code.
    "paper": {
        # Forward, as in every reported result; eq. 1 has reverse, which its author corrected
        # (idanshen/Self-Distillation#5).
        "distillation_alpha": 0.0,
        "distillation_mode": "full_logits",
        # 0.01, out of the swept 0.01, 0.02 and 0.05.
        "teacher_model_kind": "ema",
        "teacher_update_rate": 0.01,
        "teacher_sync_steps": 1,
        # Otherwise students learn to begin with "Based on the text ...".
        "num_loss_tokens_to_skip": 3,
        # Mean over the tokens of each completion, then over completions.
        "loss_type": "grpo",
        "num_generations": 1,
        # The paper uses completions of 1024 to 2048 tokens.
        "max_prompt_length": 1024,
        "max_completion_length": 1024,
        # The paper's parts in its order: question, introduction, demonstration, request.
        "teacher_prompt_template": PAPER_TEMPLATE,
        # The paper uses learning rates of 1e-5 to 5e-5.
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
    },
    # The defaults of TRL 1.5.1, which SDFTConfig shares, and transformers' where it has none.
    "trl": {
        "distillation_alpha": 0.5,
        "distillation_mode": None,  # newer names stay unset, so that flags can use the older ones
        "distillation_topk": 100,
        "teacher_model_kind": None,
        # For an EMA teacher requested by sync_ref_model: 0.6 every 512 steps.
        "teacher_update_rate": None,
        "ref_model_mixup_alpha": None,
        "teacher_sync_steps": None,
        "ref_model_sync_steps": None,
        "num_loss_tokens_to_skip": 0,
        "loss_type": "dapo",
        "num_generations": 8,
        "max_prompt_length": 512,
        "max_completion_length": 256,
        "teacher_prompt_template": "{prompt}\n\n{privileged_context}",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
    },
}

# TRL 1.16's defaults, where they differ.
RECIPES["trl-1.16"] = RECIPES["trl"] | {
    "distillation_mode": "topk_logits",
    "teacher_model_kind": "base",
    "teacher_update_rate": 0.05,
    "teacher_sync_steps": 1,
    # Mean over the tokens of each completion, then over completions.
    "loss_type": "grpo",
}

# name -> command line settings that go with the recipe's template.
OF_THE_COMMAND_LINE: dict[str, dict[str, Any]] = {
    "facts": {"demonstration_template": "$output_text", "anchor_path": ["everyday"]},
    "paper": {"demonstration_template": "$output_text"},
    "trl": {"demonstration_template": "Example response: $output_text"},
    "trl-1.16": {"demonstration_template": "Example response: $output_text"},
}


# Applies on the command line to a model and data of one's own, where no recipe is named.
OF_OWN_DATA = "facts"


def learning_rate_for(hidden_size: int, adapter: bool, model_type: str = "") -> float:
    """The learning rate of the recipe facts for a model of this width: measured at RATE_WIDTH, and inversely
    proportional to the width elsewhere, as for Adam in the maximal update parametrization (arXiv 2203.03466); at 3,584
    that is 1.6e-5, among the rates that the paper used. adapter: LoRA, which needs about ten times as much.
    model_type: of the configuration; Gemma takes a fifth, measured with Gemma 3 270M, which at a half forgot most of
    what it was asked in 10 steps: it multiplies its embeddings by the root of the width."""
    rate = RATE * RATE_WIDTH / hidden_size
    if adapter:
        rate *= RATE_OF_ADAPTER
    elif model_type.startswith("gemma"):
        rate *= RATE_OF_GEMMA
    return float(f"{rate:.1e}")


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe, for `SDFTConfig(**recipe("paper"), output_dir=...)`; to override one of them,
    `SDFTConfig(**{**recipe("paper"), "learning_rate": 1e-5})`. Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return dict(RECIPES[name])
