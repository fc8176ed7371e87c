"""The pages of --help: the settings used most on one screen, and with `--help all` every setting once, by chapter."""

import argparse
import textwrap
from collections.abc import Mapping
from dataclasses import fields

from transformers.hf_argparser import string_to_bool

from sdft_ds.config import divergence, model, prompts, rewards, rollouts, run, teacher, vllm
from sdft_ds.config.fields import own_fields
from sdft_ds.config.sdft_config import SDFTConfig

CHAPTERS = {
    "Divergence and loss": divergence.DivergenceSettings,
    "Teacher": teacher.TeacherSettings,
    "Rollouts": rollouts.RolloutSettings,
    "Rewards (SDPO)": rewards.RewardSettings,
    "Rollouts by vLLM": vllm.VllmSettings,
    "Rows and prompts": prompts.PromptSettings,
    "Model": model.ModelSettings,
    "Logging, uploads, faults": run.RunSettings,
}
UNUSED = "Of TRL's interface, accepted at their defaults only"
INHERITED = "Inherited from transformers.TrainingArguments"
WIDTH = 79

MOST_USED = """\
Self-distilled fine-tuning. Without a model and data: the embedded demo.

  deepspeed launch/train.py --deepspeed ds_configs/zero2.json [settings]
  python -m sdft_ds.train [settings]                 one process, no DeepSpeed

The settings used most; --help all lists every one. A switch is on by its name
alone, or by a value: --bf16, --bf16 false.

Model     --model NAME              hub id or folder (--model_name_or_path)
          --use_peft                train a LoRA adapter; --lora_r 16,
                                    --lora_target_modules all-linear
          --load_in_4bit            QLoRA: frozen weights in 4 bits
Data      --dataset FILE ...        files or a folder (--dataset_path)
          --dataset_name NAME       a data set on the hub
          --prompt_column, --privileged_context_column,
          --golden_response_column  columns of the rows
          --max_prompt_length N     tokens (512)
Method    --recipe NAME             facts, paper, trl, trl-1.16
          --method NAME             sdft, sdpo (with --reward), or sft
          --distillation_alpha X    0: forward KL, 1: reverse KL
          --anchor_path FILE ...    prompts against forgetting; or: none
Teacher   --teacher_model_kind NAME live, base (as at the start) or ema
          --teacher_prompt_template TEXT    of {prompt}, {privileged_context}
          --max_teacher_prompt_length N
Rollouts  --num_generations N       completions per prompt
          --max_completion_length N tokens (256)
          --temperature X, --top_p X
          --use_vllm                rollouts by vLLM; --vllm_mode
Training  --lr X                    learning rate (--learning_rate)
          --batch_size N            rows of a micro-batch on each rank
                                    (--per_device_train_batch_size)
          --gradient_accumulation_steps N
          --num_train_epochs N, --max_steps N
          --deepspeed FILE          a configuration from ds_configs/
Questions --eval_tasks FILE ...     asked before and after training
          --retention_file FILE     what must not be forgotten
Run       --output_dir FOLDER, --save_steps N, --resume_from_checkpoint
          --logging_steps N, --report_to NAME ..., --seed N
          --config FILE.yaml        settings from a file; the command line wins

Will it fit, and how fast: python -m sdft_ds.plan with the same settings.
"""


def every_setting(parser: argparse.ArgumentParser, aliases: Mapping[str, str]) -> str:
    """Every setting once: this project's by chapter, then those of transformers."""
    parts = [
        "Every setting, given as --NAME VALUE, with its default in parentheses.\nA switch without a value is on. With "
        "a model and data of your own and no\nrecipe named, the recipe facts sets some of them otherwise."
    ]
    for title, actions in _by_chapter(parser).items():
        parts.append(f"{title}\n{'-' * len(title)}")
        parts += [
            _described(action, [alias for alias in aliases if aliases[alias] == action.dest]) for action in actions
        ]
    return "\n\n".join(parts) + "\n"


def _by_chapter(parser: argparse.ArgumentParser) -> dict[str, list[argparse.Action]]:
    chapter = {f.name: title for title, kind in CHAPTERS.items() for f in own_fields(kind)}
    configured = {f.name: f for f in fields(SDFTConfig)}
    order = ["Method and data", "Model and adapter", *CHAPTERS, UNUSED, INHERITED]
    found: dict[str, list[argparse.Action]] = {title: [] for title in order}
    for group in parser._action_groups:
        for action in group._group_actions:
            if f"--{action.dest}" not in action.option_strings:  # --no_NAME, the opposite of a switch
                continue
            if action.dest in chapter:
                title = chapter[action.dest]
            elif action.dest not in configured:
                title = group.title.capitalize() if group.title.capitalize() in found else order[0]
            else:
                title = UNUSED if "unused" in configured[action.dest].metadata else INHERITED
            found[title].append(action)
    return found


def _described(action: argparse.Action, aliases: list[str]) -> str:
    head = ", ".join(f"--{name}" for name in [action.dest, *aliases])
    text = " ".join((action.help or "").replace("%%", "%").split())
    choices = "|".join(map(str, action.choices or ()))
    if choices and len(head) + 1 + len(choices) <= WIDTH:
        head = f"{head} {choices}"
    else:
        head = f"{head} {_value(action)}"
        text += f" One of: {choices.replace('|', ', ')}." if choices else ""
    default = "" if action.default in (None, argparse.SUPPRESS, [], "") else f" ({_shown(action.default)})"
    indent = " " * 6
    return "\n".join([head, *textwrap.wrap(text + default, WIDTH, initial_indent=indent, subsequent_indent=indent)])


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else repr(default).replace("\\n", "⏎").strip("'")


def _value(action: argparse.Action) -> str:
    if action.dest == "help":
        return "[all]"
    if action.type is string_to_bool:
        return "[true|false]"
    name = action.metavar or {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), "VALUE")
    return f"{name} ..." if action.nargs in ("+", "*") else name
