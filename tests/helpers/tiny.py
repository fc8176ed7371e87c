"""Tiny models and a tokenizer that tests make themselves: real architectures, random weights, no downloads."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token: lossless, and fast to make. Vocabulary 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> LlamaForCausalLM:
    """A 2-layer Llama; random weights that are large enough for its distributions to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "tie_word_embeddings": True, "initializer_range": 0.2, "attention_dropout": 0.1, **overrides,
        }
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def rows(n: int = 6) -> list[dict]:
    """Rows of a data set: conversations with contexts of different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}: {'why? ' * (i % 3)}"}],
            "privileged_context": f"Hint {i}. " + "It is so. " * (i % 4),
        }
        for i in range(n)
    ]
