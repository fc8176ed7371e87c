"""Models with random weights, made on the device from the shapes of real ones; and rows whose lengths are known."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

QWEN = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {"vocab_size": 264, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
# Of Qwen2.5-7B and 1.5B, whose weights are not needed; `narrow` has their launches and nothing to compute.
SHAPES: dict[str, PreTrainedConfig] = {
    "7b": Qwen2Config(**QWEN),
    "1.5b": Qwen2Config(**{
        **QWEN, "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "small": LlamaConfig(**{
        **LLAMA, "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
        "initializer_range": 0.05,
    }),
    "cached": LlamaConfig(**{  # all heads in the cache: much of it per token
        **LLAMA, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 2048,
    }),
    "narrow": LlamaConfig(**{**LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28}),
    "tiny": LlamaConfig(**{
        **LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2,
        "max_position_embeddings": 1024,
    }),
}  # fmt: skip


def make(shape: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape], dtype=dtype).eval()


def rows(count: int, prompt: int, context: int) -> list[dict]:
    """Rows whose prompt and context have about so many tokens each, where every byte is a token."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{i}: ".ljust(prompt, "?")}],
            "privileged_context": f"{i}: ".ljust(context, "."),
        }
        for i in range(count)
    ]
