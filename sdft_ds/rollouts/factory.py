"""Makes the rollout engine that the settings ask for."""

from collections.abc import Callable

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.model import loading
from sdft_ds.rollouts.engine import RolloutEngine, Sampling
from sdft_ds.rollouts.local import LocalRollouts


def make(
    args: SDFTConfig,
    model: nn.Module,
    engine: Callable[[], nn.Module],
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
) -> RolloutEngine:
    """engine: returns the current training wrapper of the model."""
    sampling = Sampling(
        args.generation_options, loading.stop_token_ids(model, tokenizer), tokenizer.pad_token_id, args.seed
    )
    if not args.use_vllm:
        return LocalRollouts(
            sampling,
            model,
            engine,
            args.ds3_gather_for_generation,
            accelerator.autocast,
            args.rollout_backend,
            args.rollout_batch_tokens,
        )
    if args.vllm_mode == "server":
        from sdft_ds.rollouts.vllm_server import ServerRollouts

        return ServerRollouts(sampling, args, model, engine, tokenizer)
    from sdft_ds.rollouts.vllm_colocated import ColocatedRollouts

    return ColocatedRollouts(sampling, args, model, engine)
