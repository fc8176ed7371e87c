"""A training line, as it would be run, and the job that its settings describe."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sdft_ds.cli import arguments
from sdft_ds.cli.help_page import CHAPTERS
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.config.fields import check_ranges
from sdft_ds.plan.cluster import Cluster
from sdft_ds.plan.job import SETUPS, Job, Setup
from sdft_ds.plan.model_shape import ModelShape

TEACHER_PROMPT = 2048  # tokens that are assumed where no limit is set: the model's context would be far too much
LORA = {"use_peft": True, "lora_target_modules": ["all-linear"]}
QLORA = {**LORA, "load_in_4bit": True}


@dataclass(frozen=True)
class Line:
    """launcher: its words up to the script. words: the settings as they were given. values: of all settings; names: of
    those that were given."""

    launcher: list[str]
    words: list[str]
    values: dict[str, Any]
    names: frozenset[str]

    @classmethod
    def read(cls, words: Sequence[str]) -> "Line":
        """Exits as training does for unknown settings, and raises ValueError for values that it refuses."""
        launcher, words = _split(list(words))
        found = arguments.resolve([*_of_script(launcher), *words], {})
        for kind in (ScriptArguments, ModelArguments, *CHAPTERS.values()):
            part = kind(**{f.name: found.values[f.name] for f in fields(kind) if f.init})
            check_ranges(part)
        return cls(launcher, words, found.values, found.names)

    @property
    def model(self) -> str | None:
        return self.values["model_name_or_path"]

    @property
    def starts_servers(self) -> bool:
        """Whether its job script starts vLLM's servers itself."""
        return bool(self.launcher) and self.launcher[-1].endswith("train_vllm.sbatch")

    @property
    def setup(self) -> Setup | None:
        """The setup that --deepspeed names. Raises ValueError if it is no configuration."""
        if not self.values["deepspeed"]:
            return None
        path = Path(self.values["deepspeed"])
        try:
            zero = json.loads(path.read_text()).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            raise ValueError(f"--deepspeed {path} cannot be read: {error}") from None
        offloads = [zero.get(name, {}).get("device") == "cpu" for name in ("offload_optimizer", "offload_param")]
        given = Setup(path.stem, zero.get("stage", 0), *offloads)
        return next((setup for setup in SETUPS if setup.config == given.config), given)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """(The launcher's words, the settings.)"""
    for i, word in enumerate(words):
        if word == "sdft_ds.train" or word.endswith(("train.py", ".sbatch", "multinode.sh")):
            return words[: i + 1], [each for each in words[i + 1 :] if each != "--dry-run"]
    return [], words


def _of_script(launcher: list[str]) -> list[str]:
    """Settings that a job script of launch/slurm sets before the line's own."""
    script = launcher[-1] if launcher else ""
    if script.endswith("train_vllm.sbatch"):
        return ["--deepspeed", "ds_configs/zero3.json", "--use_vllm", "true", "--vllm_mode", "server"]
    return ["--deepspeed", "ds_configs/zero2.json"] if script.endswith(".sbatch") else []


def job_of(values: dict[str, Any], cluster: Cluster, shape: ModelShape) -> Job:
    """The job that the settings describe. Raises ValueError for settings that training refuses."""
    quantized, peft = values["load_in_4bit"] or values["load_in_8bit"], values["use_peft"]
    if quantized and not peft:
        raise ValueError("Quantized weights cannot be trained: add --use_peft, which trains an adapter on them.")
    ranks = cluster.ranks
    size = values["vllm_tensor_parallel_size"] if values["use_vllm"] and values["vllm_mode"] == "colocate" else 1
    for what, number in ((f"{ranks} ranks", ranks), (f"{shape.heads} attention heads", shape.heads)):
        if number % size:
            raise ValueError(f"vllm_tensor_parallel_size={size} must divide the {what}.")
    batch, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if min(batch, accumulation) < 1:
        raise ValueError("per_device_train_batch_size and gradient_accumulation_steps must be at least 1.")
    generations = values["num_generations"] if values["method"] != "sft" else 1
    if batch * accumulation * ranks % generations:
        raise ValueError(
            f"num_generations={generations} does not divide the {batch * accumulation * ranks} rows of an optimizer "
            "step (per_device_train_batch_size x gradient_accumulation_steps x ranks)."
        )
    steps = values["steps_per_generation"]
    if values["generation_batch_size"]:
        steps = max(1, values["generation_batch_size"] // (batch * ranks))
    completion = values["max_completion_length"]
    longest = max(1, (shape.positions or 1 << 20) - completion)
    ema = values["sync_ref_model"]
    checkpointing = values["activation_checkpointing"]
    if checkpointing is None:
        checkpointing = values["gradient_checkpointing"] is not False
    return Job(
        shape=shape,
        ranks=ranks,
        tuning="full" if not peft else "qlora" if quantized else "lora",
        adapter=shape.adapter_parameters(values["lora_r"], values["lora_target_modules"]) if peft else 0,
        teacher="ema" if ema else values["teacher_model_kind"] or ("base" if peft else "live"),
        shadow_on_host=values["teacher_shadow_device"] == "cpu",
        bf16=values["bf16"] is not False or values["fp16"],
        checkpointing=checkpointing,
        batch=batch,
        accumulation=accumulation,
        generations=generations,
        prompt=values["max_prompt_length"] or longest,
        teacher_prompt=values["max_teacher_prompt_length"] or min(TEACHER_PROMPT, longest),
        completion=completion,
        scoring_tokens=values["scoring_batch_tokens"],
        rollout_tokens=values["rollout_batch_tokens"],
        topk=_topk(values),
        chunk_tokens=values["loss_chunk_tokens"],
        bits=8 if values["load_in_8bit"] else 4,
        steps_per_generation=steps,
        iterations=values["num_iterations"],
        on_cpu=cluster.on_cpu,
    )


def _topk(values: dict[str, Any]) -> int | None:
    """The size of the support, by the newer or the older names; None: the full vocabulary."""
    topk = values["distillation_topk"]
    return topk if values["distillation_mode"] in (None, "topk_logits") else None
