"""What a run says in the terminal: at its start what was chosen, at its end what it has learned and how to go on."""

import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase

from sdft_ds.cli import arguments
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import launch, zero
from sdft_ds.metrics import run_folder
from sdft_ds.metrics.verdict import verdict
from sdft_ds.trainer import MethodTrainer, SDFTTrainer


def opening(trainer: MethodTrainer) -> str:
    """One line, e.g. `LoRA on 210 modules, 4.9 M of 139 M weights · teacher base (adapter off) · forward KL, full
    vocabulary · bf16 · 30 rows, 8 a step, 4 steps an epoch, 12 steps`."""
    return " · ".join([_weights(trainer), *_method(trainer), _machine(trainer), _rows(trainer)])


def _weights(trainer: MethodTrainer) -> str:
    whole = sum(math.prod(_shape(param)) for param in trainer.model.parameters())
    trained = _count(trainer.trained_weights)
    if not hasattr(trainer.model, "peft_config"):
        return (
            f"all {trained} weights" if trainer.trained_weights == whole else f"{trained} of {_count(whole)} weights"
        )
    kind = trainer.model.active_peft_config.peft_type.value
    kind = "LoRA" if kind == "LORA" else kind
    modules = sum(isinstance(module, BaseTunerLayer) for module in trainer.model.modules())
    return f"{kind} on {modules} modules, {trained} of {_count(whole)} weights"


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    """Of the weights, also if they are packed in 4 bits."""
    packed = getattr(param, "quant_state", None)
    return zero.full_shape(param) if packed is None else packed.shape


def _method(trainer: MethodTrainer) -> list[str]:
    args = trainer.args
    if not isinstance(trainer, SDFTTrainer):
        return [args.method.upper()]
    kind = args.teacher_model_kind
    about = {
        "live": "the student itself",
        "base": "its weights at the start" if trainer.teacher.has_state else "adapter off",
        "ema": f"rate {args.teacher_update_rate:g} every {_steps(args.teacher_sync_steps).removeprefix('1 ')}",
    }.get(kind)
    return [f"teacher {kind}" + (f" ({about})" if about else ""), f"{_divergence(args)}, {_support(args)}"]


def _divergence(args: SDFTConfig) -> str:
    alpha = args.distillation_alpha
    return {0.0: "forward KL", 1.0: "reverse KL"}.get(alpha, f"Jensen-Shannon with alpha {alpha:g}")


def _support(args: SDFTConfig) -> str:
    if args.distillation_mode != "topk_logits":
        return {"full_logits": "full vocabulary", "sampled_token": "sampled tokens"}[args.distillation_mode]
    return f"top {args.distillation_topk}" + (" and the tail" if args.distillation_add_tail else "")


def _machine(trainer: MethodTrainer) -> str:
    args, stage = trainer.args, launch.configured_stage(trainer.accelerator)
    said = ["bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"]
    said += [] if stage is None else [f"ZeRO-{stage}"]
    said += [f"{args.world_size} ranks"] if args.world_size > 1 else []
    return ", ".join(said)


def _rows(trainer: MethodTrainer) -> str:
    args = trainer.args
    answers = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    said = []
    if hasattr(trainer.train_dataset, "__len__"):
        said.append(f"{len(trainer.train_dataset):,} rows")
    if trainer.anchor_dataset is not None:
        said.append(f"{len(trainer.anchor_dataset):,} anchors")
    each = f" with {args.num_generations} answers each" if args.num_generations > 1 else ""
    said.append(f"{answers / args.num_generations:.3g} a step{each}")
    steps = args.max_steps
    if hasattr(trainer.train_dataset, "__len__"):
        an_epoch = -(-len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps)
        steps = steps if steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
        said.append(f"{_steps(an_epoch)} an epoch")
    return ", ".join([*said, f"{_steps(steps)} in all"])


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number:,} steps"


def _count(number: int) -> str:
    """With three significant digits: 4.88 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def resume_command(environment: Mapping[str, str]) -> str:
    """The command that continues the run of this process. Before the settings are parsed, which set some of the
    launchers' variables."""
    flags = sys.argv[1:]
    program = sys.orig_argv[: len(sys.orig_argv) - len(flags)]
    if not program or sys.orig_argv[len(program) :] != flags:  # sys.argv was replaced by a program
        return "the same call with --resume_from_checkpoint true"
    script, local = program[-1], [flag for flag in flags if flag.startswith(("--local_rank", "--local-rank"))]
    if local and environment.get("WORLD_SIZE") == environment.get("LOCAL_SIZE"):
        program = [_beside_python("deepspeed"), "--num_gpus", environment["WORLD_SIZE"], script]
    elif "TORCHELASTIC_RUN_ID" in environment and environment["GROUP_WORLD_SIZE"] == "1":
        program = [_beside_python("torchrun"), "--nproc_per_node", environment["WORLD_SIZE"], script]
    elif "RANK" in environment:
        return "the same command with --resume_from_checkpoint true"
    given = arguments.without([flag for flag in flags if flag not in local], {"resume_from_checkpoint"})
    return shlex.join([*program, *given, "--resume_from_checkpoint", "true"])


def _beside_python(name: str) -> str:
    """A program of this environment; with its path if that is in a folder here, which may not be activated."""
    path = Path(os.path.relpath(Path(sys.executable).with_name(name)))
    return name if ".." in path.parts else str(path)


def closing(folder: str, tokenizer: PreTrainedTokenizerBase, is_adapter: bool) -> str:
    """The verdict, where the model and the page are, and the next commands."""
    run = run_folder.read(folder)
    said = [*verdict(run).sentences, "", f"Saved to {folder}"]
    if (page := Path(folder, "report.html")).exists():
        said.append(f"Report: {page}")
    return "\n".join([*said, "Next:", *_next(folder, tokenizer, is_adapter, asked=bool(run.evaluations))])


def _next(folder: str, tokenizer: PreTrainedTokenizerBase, is_adapter: bool, asked: bool) -> list[str]:
    talks = tokenizer.chat_template is not None
    question, answer = ("[{'role': 'user', 'content': 'QUESTION'}]", "[-1]['content']") if talks else ("'TEXT'", "")
    quoted = shlex.quote(str(folder))
    pipeline = f"pipeline('text-generation', {str(folder)!r})({question})[0]['generated_text']{answer}"
    commands = [f'python -c "from transformers import pipeline; print({pipeline})"']
    if not asked:
        commands.append(f"python -m sdft_ds.evaluate {quoted} --eval_tasks FILE")
    if is_adapter:
        commands.append(f"python -m sdft_ds.merge {quoted} {quoted}-merged")
    return [f"  {command}" for command in commands]
