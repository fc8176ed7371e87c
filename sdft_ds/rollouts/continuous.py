"""Rollout backend `continuous`: transformers' continuous batching; samples depend on how it batches the rows."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from sdft_ds.rollouts.draws import NonFiniteLogits
from sdft_ds.rollouts.engine import SampledTokens


def continuous(
    model: PreTrainedModel, prompts: list[list[int]], keys: list[str], config: GenerationConfig, synced: bool
) -> list[SampledTokens]:
    """Sample with transformers' continuous batching: rows join and leave the batch; the KV cache is paged.

    Sampling is seeded with the keys, but which random number a row gets depends on the batching.
    """
    seed = int.from_bytes(hashlib.blake2b("\n".join(keys).encode(), digest_size=4).digest(), "little")
    on_cpu = {}
    if model.device.type == "cpu":
        # transformers infers these from accelerator memory, which a CPU does not have.
        page, longest = 32, max(map(len, prompts)) + config.max_new_tokens
        rows = len(prompts)
        on_cpu = {
            "page_size": page,
            "num_blocks": rows * (-(-longest // page) + 1),
            "max_batch_tokens": max(2 * longest, 256),
            "max_requests_per_batch": rows,
        }
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        _finite_logits(model) as non_finite,
    ):
        outputs = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, return_logprobs=True, **on_cpu),
        )
    if bool(non_finite):
        raise NonFiniteLogits(list(range(len(prompts))))  # which of them are affected is unknown
    failed = [output.error for output in outputs.values() if output.error]
    if failed:
        raise RuntimeError(f"Continuous batching failed: {failed[0]}")
    ordered = sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))
    return [SampledTokens(outputs[name].generated_tokens, outputs[name].logprobs, processed=True) for name in ordered]


@contextmanager
def _finite_logits(model: PreTrainedModel) -> Iterator[Tensor]:
    """Replace non-finite logits inside, because sampling from them aborts the process on a GPU; yields a flag that is
    set to True if there were any."""
    flag = torch.zeros((), dtype=torch.bool, device=model.device)

    def replace(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        flag.logical_or_(~logits.isfinite().all())
        return logits.nan_to_num(0.0)

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        yield flag
    finally:
        hook.remove()
