"""The formats of data sets that are recognised by their columns, and how a row of each becomes one of the trainer's.

A demonstration, wherever a format keeps it, becomes the golden response, from which the demonstration template makes
the privileged context.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sdft_ds.data.rows import DataError, message_text

AUTO = "auto"
DEMONSTRATION_TEMPLATE = "Example response: $output_text"
# What a column may be for: the flags NAME_column, and the column that a format reads if it says nothing else.
ROLES = ("prompt", "system", "privileged_context", "teacher_prompt", "tools", "golden_response")
ALWAYS_READ = tuple(role for role in ROLES if role != "system")  # from the column of that name, in every format
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLE_NAMES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """columns: role -> its column; all are needed. optional: read where present. keys: of the messages of a
    conversation whose last turn, the assistant's, is the demonstration; columns then names the usual one only."""

    columns: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, str] | None = None


FORMATS = {
    "prompt_context": Format({"prompt": "prompt", "privileged_context": "privileged_context"}),
    "prompt_golden_response": Format({"prompt": "prompt", "golden_response": "golden_response"}),
    "question_document": Format({"prompt": "question", "privileged_context": "document"}),
    "question_answer": Format({"prompt": "question", "golden_response": "answer"}),
    "alpaca": Format({"prompt": "instruction", "golden_response": "output"}, {"input": "input", "system": "system"}),
    "sharegpt": Format({"prompt": "conversations"}, {"system": "system"}, ("from", "value")),
    "messages": Format({"prompt": "messages"}, {"system": "system"}, ("role", "content")),
    "prompt_completion": Format({"prompt": "prompt", "golden_response": "completion"}),
    "messages_output_text": Format({"prompt": "messages", "golden_response": "output_text"}),
}
# Formats that count before others with the same columns.
GIVE_WAY = {"messages_output_text": ("messages", "sharegpt"), "question_document": ("question_answer",)}
OWN = ("prompt_context", "prompt_golden_response")
COLUMN_NAMES = {name for each in FORMATS.values() for name in each.columns.values()} | {*CONVERSATIONS}


@dataclass(frozen=True)
class Columns:
    """Which column of a data set is read for what. format: its name, None where flags alone say it. columns: role ->
    column; the role `input` is alpaca's. dialogue: the prompt's column holds the demonstration as well."""

    format: str | None
    columns: dict[str, str]
    dialogue: bool = False

    @property
    def described(self) -> str:
        """Which column each role is read from, for a note."""
        merged = {role: repr(column) for role, column in self.columns.items() if role != "input"}
        merged["prompt"] = self._prompt
        if self.dialogue:
            sources = [merged[role] for role in ("golden_response",) if role in merged]
            merged["golden_response"] = " or ".join([*sources, f"the last turn of {self._prompt}"])
        listed = [role if column == repr(role) else f"{role} from {column}" for role, column in merged.items()]
        return f"Data set {'columns' if self.format is None else f'format {self.format}'}: {', '.join(listed)}."

    @property
    def notes(self) -> list[str]:
        """Where prompt and context come from unless from the columns of that name, for messages about rows."""
        contexts = [self.columns.get(role) for role in ("privileged_context", "golden_response")]
        found = [repr(column) for column in contexts if column]
        found += [f"the last turn of {self._prompt}"] if self.dialogue else []
        notes = [f"prompt from column {self._prompt}"] if self._prompt != "'prompt'" else []
        if found and found != ["'privileged_context'"]:
            notes.append(f"privileged_context from {' or '.join(found)}")
        return notes

    @property
    def _prompt(self) -> str:
        return " and ".join(repr(self.columns[role]) for role in ("prompt", "input") if role in self.columns)


def fits(name: str, found: Sequence[str], given: Mapping[str, str]) -> bool:
    """Whether all columns of the format are there, or what is given for them."""
    return all(given.get(role, column) in found for role, column in FORMATS[name].columns.items())


def resolve(
    found: Sequence[str], rows: Sequence[Mapping[str, Any]], name: str, given: Mapping[str, str], where: str,
    context_optional: bool = False,
) -> Columns:  # fmt: skip
    """Which of the columns `found` are read, by what was given for each role, or else by the format `name`, or the one
    that is recognised. rows: the first ones.

    context_optional: a prompt is enough. Raises DataError, listing the columns and the remedy.
    """
    for role, column in given.items():
        if column not in found:
            raise DataError(f"{role}_column={column}, but {where} has the columns {', '.join(found)}.")
    own = {role: role for role in ALWAYS_READ if role in found} | dict(given)
    taught = [role for role in ("privileged_context", "teacher_prompt", "golden_response") if role in own]
    if name == AUTO:
        if "prompt" in own and taught:
            from_flags = {"prompt", taught[0]} <= given.keys()
            return Columns(None if from_flags else OWN[taught == ["golden_response"]], own)
        prompt = own.get("prompt")
        name, conversation = _recognised(
            found, rows, given, where, prompt, or_prompt=context_optional and prompt is not None
        )
        if name is None:
            return Columns(None, own)
        given = {"prompt": conversation, **given} if conversation else given
    return _of_format(FORMATS[name], name, found, rows, own, given, where)


def _of_format(
    format: Format, name: str, found: Sequence[str], rows: Sequence[Mapping[str, Any]], own: Mapping[str, str],
    given: Mapping[str, str], where: str,
) -> Columns:  # fmt: skip
    columns = {role: given.get(role, column) for role, column in format.columns.items()}
    if format.keys and "prompt" not in given:
        present = [column for column in CONVERSATIONS if column in found]
        columns["prompt"] = next(iter(_of_keys(present, format.keys, rows) or present), columns["prompt"])
    missing = [column for column in columns.values() if column not in found]
    if "teacher_prompt" in own and columns.get("privileged_context") in missing:
        missing.remove(columns.pop("privileged_context"))
    if missing:
        raise DataError(
            f"{where} has the columns {', '.join(found)}, and lacks {', '.join(missing)}, which "
            f"dataset_format={name} reads: name another format, or the columns (prompt_column, ...)."
        )
    columns |= {role: column for role, column in format.optional.items() if column in found}
    return Columns(name, own | columns | dict(given), dialogue=format.keys is not None)


def _recognised(
    found: Sequence[str], rows: Sequence[Mapping[str, Any]], given: Mapping[str, str], where: str, prompt: str | None,
    or_prompt: bool,
) -> tuple[str | None, str | None]:  # fmt: skip
    """(name, column of the conversation if it has one) of the only format that the columns fit; Nones for none, if
    or_prompt. prompt: its column, if that is known anyway."""
    matches: list[tuple[str, str | None]] = []
    for name, format in FORMATS.items():
        if format.keys:
            present = [given["prompt"]] if "prompt" in given else [c for c in CONVERSATIONS if c in found]
            matches += [(name, column) for column in _of_keys(present, format.keys, rows)]
        elif name not in OWN and fits(name, found, given):
            matches.append((name, None))
    for name, without in GIVE_WAY.items():
        if any(match[0] == name for match in matches):
            matches = [match for match in matches if match[0] not in without]
    if len(matches) == 1:
        return matches[0]
    if not matches and or_prompt:
        return None, None
    if matches:
        which = ", ".join(name if column is None else f"{name} in {column!r}" for name, column in matches)
        raise DataError(
            f"{where} has the columns {', '.join(found)}, which are those of several formats ({which}): set "
            f"{'prompt_column' if len({name for name, _ in matches}) == 1 else 'dataset_format'} to one of them."
        )
    known = ", ".join(f"{name} ({', '.join(format.columns.values())})" for name, format in FORMATS.items())
    remedy = (
        "what the teacher is shown: golden_response_column for an answer, privileged_context_column for anything else"
    )
    if prompt is not None:
        missing = f"{prompt!r} is the prompt, and none of the others is known. Set the column of {remedy}"
    else:
        missing = f"they are those of no known format. Set prompt_column, and the column of {remedy}"
    raise DataError(f"{where} has the columns {', '.join(found)}: {missing}. Known formats: {known}.")


def _of_keys(columns: Sequence[str], keys: tuple[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns whose first value that is not empty is a list of messages, the first of them with the first key."""
    first = {column: decoded(next((row[column] for row in rows if row.get(column)), None)) for column in columns}
    return [
        column
        for column, value in first.items()
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].get(keys[0]) is not None
    ]


def decoded(value: Any) -> Any:
    """A conversation from its JSON, as a cell of a table holds it; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def messages_in(value: Any) -> Any:
    """As `decoded`, but a text that is a JSON list of anything but messages stays a text."""
    found = decoded(value)
    turns = found if isinstance(found, list) else []
    said = turns and all(isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in turns)
    return found if said else value


def with_roles(value: Any) -> tuple[Any, str]:
    """(a conversation with role and content for from and value, what is wrong with it or ""). What is no conversation
    is returned as it is, for the trainer to name."""
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return value, ""
    speakers = [str(turn["from"]) for turn in value if turn.get("from") is not None]
    if unknown := [speaker for speaker in speakers if speaker not in ROLE_NAMES]:
        known = ", ".join(ROLE_NAMES)  # the row keeps no prompt: its messages have other keys than those of the others
        return None, f"found a turn from {unknown[0]!r}; known are {known}: rename it, or drop the row."
    return [_message(turn) for turn in value], ""


def split_demonstration(conversation: Any) -> tuple[Any, str]:
    """(the turns before the last one, if that is the assistant's, else all; its text)."""
    if not isinstance(conversation, list) or not conversation or not isinstance(conversation[-1], Mapping):
        return conversation, ""
    last = conversation[-1]
    return (conversation[:-1], text_of(last)) if last.get("role") == "assistant" else (conversation, "")


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    """With role and content; tables have a key that only other rows use as None."""
    if turn.get("from") is None:
        return dict(turn)
    return {"role": ROLE_NAMES[str(turn["from"])], "content": turn.get("value")}


def text_of(value: Any) -> str:
    """A demonstration or a message as text: a string, messages, or a list of either, joined by newlines. None, and
    messages without text, are empty."""
    if isinstance(value, list):
        return "\n".join(text_of(part) for part in value)
    if isinstance(value, dict):
        try:
            return message_text(value.get("content"))
        except TypeError:
            return ""
    return "" if value is None else str(value)
