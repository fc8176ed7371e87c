"""Greedy answers of a model to the demo's questions, one batch per call."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft_ds.demo.world import Question

MAX_NEW_TOKENS = 14  # the longest sentence of the world has 8 tokens and EOS; the rest shows a failure to stop


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> list[str]:
    """The model's greedy completion of each question, as text without special tokens."""
    prompts = [question.messages for question in questions]
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    ).to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, use_cache=True)
    model.train(was_training)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
