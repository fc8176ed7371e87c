"""Generates docs/settings.md, the reference of all settings, from their declarations.

python -m sdft_ds.cli.settings_page > docs/settings.md
"""

from dataclasses import Field, fields
from typing import Any, get_type_hints

from sdft_ds.cli.help_page import CHAPTERS
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.config.fields import FREE, choices_of, own_fields
from sdft_ds.config.inherited import IGNORED_FIELDS, ON_RESUME, REFUSED_FIELDS

COMMAND_LINE = {"Method and data": ScriptArguments, "Model and adapter": ModelArguments}
INTRODUCTION = """\
# Settings

Made from the declarations by `python -m sdft_ds.cli.settings_page`; a test compares the two. In Python these are the
fields of `SDFTConfig`, on the command line flags of the same names (`--distillation_alpha 0`), in a YAML file keys.
*Resume*: what a resume does where the value is not the checkpoint's; where nothing is said, the given value counts
from the next step or generation batch on. Settings marked with methods are read by these only; the defaults are those
of SDFT: SDPO has others, which [its page](sdpo.md) names.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for title, chapter in CHAPTERS.items():
        parts.append(f"## {title}\n\n" + _table([_row(chapter, f, resume=True) for f in own_fields(chapter)], True))
    parts.append("# On the command line only")
    for title, kind in COMMAND_LINE.items():
        parts.append(f"## {title}\n\n" + _table([_row(kind, f, resume=False) for f in fields(kind) if f.init], False))
    parts.append(_inherited())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _inherited() -> str:
    said = [
        f"`{name}`: {': '.join(filter(None, (done.kind, done.reason)))}"
        for name, done in ON_RESUME.items()
        if done is not FREE
    ]
    return (
        "# Inherited from transformers.TrainingArguments\n\nThey do what transformers says, with these exceptions.\n\n"
        f"Without effect, and warned about: {_names(IGNORED_FIELDS)}.\n\n"
        f"Refused elsewhere than at their default: {_names(REFUSED_FIELDS)}.\n\n"
        "On a resume with another value:\n\n" + "\n".join(f"- {line}" for line in said)
    )


def _names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _row(kind: type, f: Field, resume: bool) -> list[str]:
    choices, valid = choices_of(kind, f), f.metadata.get("valid")
    value = ", ".join(f"`{name}`" for name in choices) if choices else _type(get_type_hints(kind)[f.name])
    if valid is not None:
        value += f", {valid.words}"
    row = [f"`{f.name}`", value, f"`{f.default!r}`".replace("\\n", "⏎"), f.metadata["help"]]
    if resume:
        about, done = [], f.metadata["resume"]
        if f.metadata["read_by"] is not None:
            about.append(", ".join(map(str.upper, f.metadata["read_by"])))
        if done is not FREE:
            about.append(f"resume: {done.kind}")
        row.append("; ".join(about))
    return [cell.replace("|", "\\|") for cell in row]


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return text.replace("typing.", "").replace("str | list[str]", "list").replace("NoneType", "None")


def _table(rows: list[list[str]], resume: bool) -> str:
    head = ["setting", "value", "default", "meaning"] + ([""] if resume else [])
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(page(), end="")
