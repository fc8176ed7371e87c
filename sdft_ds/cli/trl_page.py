"""Generates docs/trl_fields.md: every field of TRL's SDFTConfig, its default there and here, and what to change.

python -m sdft_ds.cli.trl_page > docs/trl_fields.md
python -m sdft_ds.cli.trl_page --read      with TRL installed: write its version's fields to trl_fields.json first
"""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sdft_ds.config.fields import default_of
from sdft_ds.config.inherited import IGNORED_FIELDS, REFUSED_ARGUMENTS, REFUSED_FIELDS
from sdft_ds.config.sdft_config import SDFTConfig

# {version of TRL: {field: default}}: the fields that TRL's SDFTConfig declares beside transformers' own.
FILE = Path(__file__).with_name("trl_fields.json")
SAME, RENAMED, OTHER_DEFAULT, NO_EFFECT, REFUSED = "same", "renamed", "other default", "no effect", "refused"

# Field -> its newer name; the older one is accepted as well.
NEWER_NAMES = {
    "gradient_checkpointing": "`activation_checkpointing`, of transformers: on unless False",
    "sync_ref_model": '`teacher_model_kind="ema"`',
    "ref_model_mixup_alpha": "`teacher_update_rate`; unset is 0.6 with `sync_ref_model`",
    "ref_model_sync_steps": "`teacher_sync_steps`; unset is 512 with `sync_ref_model`",
    "full_logit_distillation": '`distillation_mode="full_logits"`, where `distillation_topk` is None',
}
# Field with another default than in one of the versions -> how to get that version's.
OTHER_DEFAULTS = {
    "teacher_model_kind": '`"base"`, or `recipe("trl-1.16")`; unset is `live`, with PEFT `base`, as in 1.5.1',
    "loss_type": '1.16 has none and computes `grpo`: set that, or `recipe("trl-1.16")`',
}
# Field -> what else is to be known.
REMARKS = {
    "model_init_kwargs": "a `token` in it is refused: set HF_TOKEN",
    "disable_dropout": "dropout of attention as well, which TRL leaves on",
    "max_prompt_length": "of the student's prompt; the teacher's has `max_teacher_prompt_length`",
    "num_generations_eval": "1.5.1 ignores it",
    "generation_batch_size": "may be given together with `steps_per_generation`, if the two agree",
    "generation_kwargs": "without names that have a setting of their own, as `top_p`",
    "use_vllm": "1.5.1 refuses it",
    "vllm_model_impl": "`auto` as well",
    "vllm_server_base_url": "of a server started by `launch/vllm_server.sh`; several, separated by commas",
    "teacher_update_rate": 'unset is 0.05 with `teacher_model_kind="ema"`',
    "teacher_sync_steps": 'unset is 1 with `teacher_model_kind="ema"`',
    "distillation_mode": "unset is `topk_logits`, unless `distillation_topk` is None",
    "use_liger_kernel": "Liger's losses stay off",
    "mask_truncated_completions": "1.5.1 ignores it",
    "distillation_weight": "1.5.1 ignores it",
    "epsilon_high": "the value of `epsilon` is accepted as well",
    "scale_rewards": "True is accepted as well",
}

INTRODUCTION = """\
# TRL's settings, field by field

Made by `python -m sdft_ds.cli.trl_page` from the dataclasses of TRL and of this project; a test compares them.
[trl](trl.md) says what differs beside the settings, [settings](settings.md) lists those that TRL does not have.

- **same**: the same name, meaning and default.
- **other default**: the same name and meaning; a script that relies on TRL's default sets it.
- **renamed**: accepted under TRL's name, and under the newer one that is given.
- **no effect**: accepted; another value than the default gives a warning.
- **refused**: accepted at its default only; another value is an error that names the field.

## Fields of SDFTConfig that are not the same
"""
INHERITED = """
## Fields of transformers.TrainingArguments

SDFTConfig inherits them here as in TRL, with transformers' defaults. Those that are not the same:
"""
ARGUMENTS = """
## Arguments of SDFTTrainer

TRL's are accepted: `model`, `args`, `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`, `optimizers`,
`peft_config`. Those of other trainers and of older scripts are refused:
"""


def page() -> str:
    versions = known()
    names = list(dict.fromkeys(name for version in reversed(versions) for name in versions[version]))
    head = ["field", *(f"TRL {version.removesuffix('.0')}" for version in versions), "here", "status", "what to do"]
    rows = {name: _row(name, list(versions.values())) for name in names}
    different = [rows[name] for name in names if status(name) != SAME]
    same = [[*rows[name][:-2], rows[name][-1]] for name in names if status(name) == SAME]
    inherited = [[f"`{name}`", REFUSED, reason] for name, reason in REFUSED_FIELDS.items()]
    inherited += [[f"`{name}`", NO_EFFECT, reason] for name, reason in IGNORED_FIELDS.items() if name not in names]
    arguments = [[f"`{name}`", reason] for name, reason in REFUSED_ARGUMENTS.items()]
    parts = [
        INTRODUCTION,
        _table(head, different),
        "\n## Fields of SDFTConfig that are the same\n",
        _table([*head[:-2], ""], same),
        INHERITED,
        _table(["field", "status", "why, and what to do"], inherited),
        ARGUMENTS,
        _table(["argument", "why, and what to do"], arguments),
    ]
    return "\n".join(parts) + "\n"


def known() -> dict[str, dict[str, Any]]:
    """{version: {field: default}} of FILE, oldest version first."""
    return json.loads(FILE.read_text())


def status(name: str) -> str:
    """One of the statuses above."""
    if "unused" in SDFTConfig.__dataclass_fields__[name].metadata:
        return REFUSED
    if name in IGNORED_FIELDS:
        return NO_EFFECT
    if name in NEWER_NAMES:
        return RENAMED
    return OTHER_DEFAULT if name in OTHER_DEFAULTS else SAME


def _row(name: str, versions: list[dict[str, Any]]) -> list[str]:
    f = SDFTConfig.__dataclass_fields__[name]
    defaults = [_code(version[name]) if name in version else "–" for version in versions]
    reason = f.metadata.get("unused", IGNORED_FIELDS.get(name))
    about = [reason and f"leave it out: {reason}", *(of.get(name) for of in (NEWER_NAMES, OTHER_DEFAULTS, REMARKS))]
    return [f"`{name}`", *defaults, _code(default_of(f)), status(name), "; ".join(filter(None, about))]


def _code(value: Any) -> str:
    return f"`{value!r}`".replace("\\n", "⏎")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def installed() -> tuple[str, dict[str, Any]]:
    """(version, {field: default}) of the installed TRL."""
    import trl
    from trl.experimental import sdft

    # Those that TRL declares, whatever version of transformers it is installed with.
    own = [vars(kind).get("__annotations__", {}) for kind in sdft.SDFTConfig.__mro__]
    own = own[: sdft.SDFTConfig.__mro__.index(TrainingArguments)]
    declared = {name for names in own for name in names}
    return trl.__version__, {f.name: default_of(f) for f in fields(sdft.SDFTConfig) if f.name in declared}


def _read() -> None:
    version, found = installed()
    versions = {**(known() if FILE.exists() else {}), version: found}
    in_order = sorted(versions, key=lambda each: [int(part) for part in each.split(".")])
    FILE.write_text(json.dumps({each: versions[each] for each in in_order}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--read"]:
        _read()
    print(page(), end="")
