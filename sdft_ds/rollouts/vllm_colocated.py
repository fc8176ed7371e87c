"""Rollout engine vllm_mode=colocate: vLLM in the training processes, one engine per rank or tensor-parallel group.

Imports vllm; sets its environment variables. The engine starts with random weights: what it generates with can only
be what was pushed.
"""

import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.vllm import VLLM_DISTRIBUTIONS
from sdft_ds.distributed import ranks
from sdft_ds.model import export
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.rollouts import weight_sums
from sdft_ds.rollouts.engine import SampledTokens, Sampling
from sdft_ds.rollouts.vllm_engine import VllmRollouts, check_version
from sdft_ds.rollouts.weight_sums import Sums, WeightSums

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; used on a CPU only
}


class ColocatedRollouts(VllmRollouts):
    def __init__(self, sampling: Sampling, args: SDFTConfig, model: nn.Module, engine: Callable[[], nn.Module]):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("use_vllm=True needs vLLM, which is not installed: see launch/vllm_environment.sh.")
        check_version(_version(), "the installed one")
        super().__init__(sampling, model, args.device)
        self.args, self.engine = args, engine
        self.dtype = args.compute_dtype
        self.sleeps = args.vllm_enable_sleep_mode
        self.llm: Any = None

    def start(self) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        args = self.args
        config = causal_lm_of(self.model).config
        launched = {"distributed_executor_backend": "external_launcher"} if ranks.world_size() > 1 else {}
        with tempfile.TemporaryDirectory() as folder, _generators_kept():
            _write_config(config, self.serves_tied_head, folder)
            try:
                self.llm = LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=str(self.dtype).removeprefix("torch."),
                    model_impl=args.vllm_model_impl,
                    max_model_len=args.vllm_max_model_length,
                    tensor_parallel_size=args.vllm_tensor_parallel_size,
                    gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                    enable_sleep_mode=self.sleeps,
                    enforce_eager=args.use_cpu,  # compiling pays on a GPU
                    logprobs_mode=self.log_probs_mode,
                    seed=args.seed,
                    disable_log_stats=True,
                    **launched,
                )
            except ValueError as error:  # a model or a length that it cannot serve, too little memory
                raise ValueError(
                    f"vLLM cannot serve this model with these settings (vllm_model_impl, vllm_max_model_length, "
                    f"vllm_gpu_memory_utilization): {' '.join(str(error).split())}"
                ) from None
        self.longest = self.llm.llm_engine.model_config.max_model_len
        if self.sleeps:
            self.llm.sleep(level=2)
        ranks.barrier()  # creating an engine takes ranks unequal times; DeepSpeed's next collective would wait

    def publish(self) -> None:
        """Load the weights a decoder layer at a time. After level-2 sleep the KV cache is allocated afterwards."""
        if self.sleeps:
            self.llm.wake_up(tags=["weights"])
        ours: Sums = {}
        pairs = self._pairs(ours if self.pushes == 0 else None)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        if self.pushes == 0:
            for theirs in self.llm.collective_rpc(WeightSums.weight_sums):
                self.check_sums(ours, theirs)
        self.pushes += 1

    def _pairs(self, sums: Sums | None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) pairs; adds them to the sums, if any."""
        for part in export.whole_weights(self.engine(), self.model, self.dtype, not self.serves_tied_head):
            if sums is not None:
                weight_sums.add(sums, part)
            yield from part

    def submit(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> Callable[[], list[SampledTokens]]:
        from vllm import SamplingParams

        # Ranks that share an engine give it the same requests in the same order, and each keeps its own.
        size = self.args.vllm_tensor_parallel_size
        asked, before = list(zip(prompts, parameters, strict=True)), 0
        if size > 1:
            first = ranks.rank() // size * size
            of_group = ranks.all_gather_objects(asked)[first : first + size]
            before = sum(map(len, of_group[: ranks.rank() - first]))
            asked = [each for of_rank in of_group for each in of_rank]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in asked],
            [SamplingParams(**each, detokenize=False) for _, each in asked],
            use_tqdm=False,
        )
        if self.sleeps:
            self.llm.sleep(level=2)
            self.is_stale = True  # its weights are gone
        sampled = [self._sampled(output.outputs[0]) for output in outputs[before : before + len(prompts)]]
        return lambda: sampled

    def _sampled(self, output: Any) -> SampledTokens:
        ids = list(output.token_ids)
        log_probs = [of_token[token].logprob for token, of_token in zip(ids, output.logprobs, strict=True)]
        return self.sampled(ids, log_probs)

    def close(self) -> None:
        # vLLM's own shutdown would destroy the process group, which is the training's.
        if self.llm is not None:
            from vllm.distributed.parallel_state import destroy_model_parallel
            from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

            destroy_model_parallel()
            LAYERWISE_INFO.clear()  # its values refer to its weak keys, which keeps all weights and the KV cache
            self.llm, self.longest, self.is_stale, self.pushes = None, None, True, 0
            gc.unfreeze()  # vLLM exempts what an engine allocates at its start from garbage collection
            gc.collect()


@contextmanager
def _generators_kept() -> Iterator[None]:
    """vLLM seeds all generators of its process, which is the training's."""
    state, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(state)
    numpy.random.set_state(of_numpy)


def _version() -> str:
    for name in VLLM_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ValueError("vllm can be imported but is not an installed package: see launch/vllm_environment.sh.")


def _write_config(config: Any, tied: bool, folder: str) -> None:
    """The model's configuration for vLLM: without quantization, because dequantized weights are pushed."""
    text = config.get_text_config(decoder=True)
    was = text.tie_word_embeddings
    text.tie_word_embeddings = tied
    try:
        config.save_pretrained(folder)
    finally:
        text.tie_word_embeddings = was
    path = Path(folder, "config.json")
    about = json.loads(path.read_text())
    about.pop("quantization_config", None)
    path.write_text(json.dumps(about))
