"""Prompts -> completions sampled from the current weights, the same tokens on any number of ranks.

A row's randomness is a function of (run seed, generation batch, row number, token position): nothing is drawn from a
shared generator, so ranks, batch sizes and resumes do not change what is sampled (up to the rounding of the logits).
"""

import hashlib
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from sdft_ds.module_state import evaluating
from sdft_ds.paired_batch import Completion, pad_left

# What shapes a distribution to sample from; transformers warns where it is given and nothing is sampled.
SAMPLING_OPTIONS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}


class RaceNoise(LogitsProcessor):
    """Adds to each row's scores the Gumbel noise that belongs to its key and position, so that argmax is a sample.

    keys: one string a row. prompt_width: columns of the padded prompt, from which positions are counted.
    """

    # exponential_ can return 0 where its uniform draw does; half of its smallest step keeps the noise finite.
    SMALLEST = 2.0**-25

    def __init__(self, keys: list[str], prompt_width: int, device: torch.device):
        self.keys = keys
        self.prompt_width = prompt_width
        self.generator = torch.Generator(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        race = torch.empty_like(scores, dtype=torch.float32)
        for row, key in enumerate(self.keys):
            digest = hashlib.blake2b(f"{key}/{position}".encode(), digest_size=8).digest()
            self.generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            race[row].exponential_(generator=self.generator)
        return scores - race.clamp_(min=self.SMALLEST).log_()


class Sampler:
    """Generates with transformers' `generate`.

    options: fields of GenerationConfig. Fields that are not given take transformers' global defaults, never those of
    the model's own generation_config: a sampling setting that nobody asked for would change what is learned.
    """

    def __init__(self, options: dict[str, Any], eos_token_ids: list[int], pad_token_id: int, seed: int):
        unsupported = {"num_beams", "num_return_sequences", "prompt_lookup_num_tokens", "streamer"} & set(options)
        if unsupported:
            raise ValueError(
                f"generation_kwargs: {', '.join(sorted(unsupported))} cannot be used for rollouts, which sample one "
                "completion for each row; see num_generations."
            )
        self.options = options
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.seed = seed

    def sample(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        keys: list[str],
        weights: AbstractContextManager[bool],
        **overrides: Any,
    ) -> list[Completion]:
        """One completion for each prompt.

        keys: what makes a row's randomness its own, in addition to the run's seed. weights: the context in which the
        model can generate; it says whether every rank goes on until the last is done (zero.generation_weights).
        overrides: options for this call only.
        """
        options = {**self.options, **overrides}
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
        config = GenerationConfig(
            **options, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id, use_cache=True
        )
        input_ids, attention_mask = pad_left(prompts, self.pad_token_id, model.device)
        noise = RaceNoise([f"{self.seed}/{key}" for key in keys], input_ids.shape[1], model.device)

        def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
            if generation_config.do_sample:
                logits_processor.append(noise)
                generation_config.do_sample = False
            # `generate` does not hand synced_gpus on to a custom loop.
            return model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced, **kwargs
            )

        with torch.no_grad(), evaluating(model), _own_generation_config(model), weights as synced:
            output = model.generate(
                input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=decode
            )
        completions = [self._completion(row) for row in output[:, input_ids.shape[1] :].tolist()]
        if len(completions) != len(prompts):
            raise RuntimeError(f"Generation returned {len(completions)} completions for {len(prompts)} prompts.")
        return completions

    def _completion(self, tokens: list[int]) -> Completion:
        """Cut after the first end-of-sequence token, which is kept: it is part of what the student said."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        return Completion(ids=tokens[:end], truncated=end is None)


@contextmanager
def _own_generation_config(model: PreTrainedModel):
    """transformers fills what a GenerationConfig leaves open from the model's own: keep that one out of the way."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved
