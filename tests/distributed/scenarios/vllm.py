"""What the tests of vLLM run on every rank; needs vLLM."""

import gc
import os
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from sdft_ds.distributed import zero
from sdft_ds.model.completion_forward import causal_lm_of
from tests.distributed.scenarios.export import merged, student
from tests.helpers.trainers import Recorder, make_trainer

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
VLLM = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.1}
GREEDY = {"generation_kwargs": {"do_sample": False}, "teacher_model_kind": "base"}


def keep_weights_as_loaded() -> None:
    """Let vLLM compute with plain products on a CPU: repacked weights could not be compared with ours."""
    import vllm._custom_ops as ops

    ops._supports_onednn = False


def steps(stage: int | None = None, lora: bool | str = False, tied: bool = True, **settings) -> dict[str, Any]:
    """Three steps: losses, completions, and the distance of the sampler's log-probabilities."""
    recorder = Recorder()
    trainer = make_trainer(stage, model=student(lora, tied), callbacks=[recorder], **{**GREEDY, **settings})
    trainer.train()
    logs = [log for log in recorder.logs if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "completions": recorder.completions,
        "logprob_diff": [log.get("rollout/logprob_diff_max") for log in logs],
        "importance": [log.get("is/ratio") for log in logs],
        "random": torch.rand(1).item(),
    }


def steps_with_a_nan(**settings) -> None:
    """The weights are not numbers from the second rollout on."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            causal_lm_of(model).model.norm.weight.data.fill_(float("nan"))

    make_trainer(model=student(False), callbacks=[Spoil()], **{**GREEDY, **settings}).train()


def engine_weights(rollouts: Any) -> dict[str, Tensor]:
    """All weights of the colocated engine."""
    return {
        name: param.detach().float().clone()
        for name, param in rollouts.llm.collective_rpc(lambda worker: worker.model_runner.model)[0].named_parameters()
    }


def as_the_engine_fuses(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Llama under the names and in the form of vLLM."""
    fused: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        for part, whole in (("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj"),
                            ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")):  # fmt: skip
            name = name.replace(f".{part}.", f".{whole}.")
        fused.setdefault(name, []).append(tensor)
    return {name: torch.cat(parts) for name, parts in fused.items()}


def pushes(stage: int | None, lora: bool | str, **settings) -> list[dict[str, float]]:
    """After each push of three steps: the largest difference of each of the engine's tensors to what PEFT merges."""
    keep_weights_as_loaded()
    trainer = make_trainer(stage, model=student(lora), **{**GREEDY, **VLLM, **settings})
    found, publish = [], trainer.rollouts.publish

    def compare() -> None:
        publish()
        ours = as_the_engine_fuses(merged(trainer.model_wrapped, trainer.model, lora))
        theirs = engine_weights(trainer.rollouts)
        assert ours.keys() == theirs.keys()
        found.append({name: (theirs[name][: len(ours[name])] - ours[name]).abs().max().item() for name in ours})

    trainer.rollouts.publish = compare
    trainer.train()
    return found


def interrupted(stage: int | None, folder: str, resumed: bool, **settings) -> dict[str, Any]:
    """A run of six steps on generation batches that are used twice, saved after the third; or the rest of it, resumed
    from there. Losses by step, and the trained weights."""
    recorder = Recorder()
    trainer = make_trainer(
        stage,
        model=student(False),
        callbacks=[recorder],
        **{
            "max_steps": 6,
            "num_iterations": 2,
            "output_dir": folder,
            "save_strategy": "steps",
            "save_steps": 3,
            **settings,
        },
    )
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resumed else None)
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "weights": torch.cat([copy.flatten() for copy in zero.full_copies(list(trainer.model.parameters()))]),
    }


def memory_of_runs(runs: int) -> list[float]:
    """Resident GiB after each of several runs in one process."""
    sizes = []
    for _ in range(runs):
        steps(max_steps=1, **VLLM)
        gc.collect()
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30)
    return sizes
