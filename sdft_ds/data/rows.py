"""Row parsing and validation: data set row -> Example with the student's prompt and the teacher's extra context."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]

COLUMNS = ("prompt", "privileged_context")
PROBLEM = "_problem"  # column with what is wrong with a row as it was stored; empty for most


@dataclass(frozen=True)
class Example:
    """prompt: plain text, or a conversation ending with a user message; privileged_context: for the teacher only; None
    if there is none (yet), so that the teacher sees the same prompt.

    teacher_prompt: replaces the filled template; a text replaces the last user message, a conversation the complete
    prompt. tools: function schemas for the chat template, for both prompts. anchor: a row of the anchors.
    """

    prompt: Prompt
    privileged_context: str | None
    teacher_prompt: Prompt | None = None
    tools: list[dict[str, Any]] | None = None
    anchor: bool = False


class DataError(ValueError):
    """A data set that cannot be trained on as it is."""


class RowError(DataError):
    """A row that cannot be used; the message names the row, the column and the remedy."""

    def __init__(self, index: int, column: str, problem: str):
        super().__init__(f"Row {index}, column {column!r}: {problem}")


def check_columns(found: list[str], context_optional: bool = False) -> None:
    """Raises DataError if required columns are missing; lists the columns found. context_optional: see
    PromptBuilder."""
    missing = [name for name in COLUMNS if name not in found]
    if "teacher_prompt" in found or context_optional:
        missing = [name for name in missing if name == "prompt"]
    if missing:
        raise DataError(
            f"The data set has the columns {', '.join(found) or '(none)'}, and lacks {', '.join(missing)}. "
            f"Needed are {' and '.join(COLUMNS)}: convert it by sdft_ds.read_dataset(dataset), which knows the usual "
            "formats and takes the names of other columns, or rename a column (dataset.rename_column)."
        )


def example_from_row(row: Mapping[str, Any], index: int, context_optional: bool = False) -> Example:
    """Validate one row. Raises RowError naming row `index` and the column. context_optional: see PromptBuilder."""
    check_columns(list(row), context_optional=context_optional)
    _check_stored(row, index)
    prompt = checked_prompt(row["prompt"], index)
    teacher_prompt = row.get("teacher_prompt")
    if teacher_prompt is not None:
        teacher_prompt = checked_prompt(teacher_prompt, index, "teacher_prompt")
        if isinstance(prompt, str) and not isinstance(teacher_prompt, str):
            raise RowError(
                index, "teacher_prompt", "found a conversation, but 'prompt' is a text; make both the same."
            )
    context = row.get("privileged_context")
    if teacher_prompt is not None:
        context = ""
    else:
        context = optional_context(context, index) if context_optional else checked_context(context, index)
    return Example(
        prompt=prompt,
        privileged_context=context,
        teacher_prompt=teacher_prompt,
        tools=_tools(row.get("tools"), prompt, index),
    )


def anchor_from_row(row: Mapping[str, Any], index: int) -> Example:
    """Validate one row of the anchors, of which only the prompt and its tools are read. Raises RowError."""
    _check_stored(row, index)
    prompt = checked_prompt(row.get("prompt"), index)
    return Example(prompt, privileged_context=None, tools=_tools(row.get("tools"), prompt, index), anchor=True)


def demonstration_of(row: Mapping[str, Any], example: Example, index: int) -> str:
    """What supervised fine-tuning trains a row on: its golden response, or else its context. Raises RowError."""
    text = row.get("golden_response") or example.privileged_context
    if not isinstance(text, str) or not text:
        found = type(text).__name__ if text else "nothing"
        what = "golden_response of the anchors" if example.anchor else "golden_response"
        raise RowError(index, what, f"found {found}; expected text.")
    return text


def _check_stored(row: Mapping[str, Any], index: int) -> None:
    if row.get(PROBLEM):
        raise RowError(index, "prompt", row[PROBLEM])


def message_text(content: Any) -> str:
    """The text of a message's content: a string, or a list's text parts joined by spaces.

    Raises TypeError for anything else, such as an image.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        others = sorted({str(kind) for kind in kinds if kind != "text"})
        if others:
            raise TypeError(f"content parts of type {', '.join(others)}; only text is supported")
        if all(isinstance(part.get("text"), str) for part in content):
            return " ".join(part["text"] for part in content)
        raise TypeError("a content part of type text without a 'text'")
    raise TypeError(f"content of type {type(content).__name__}; text or a list of text parts is needed")


def checked_prompt(value: Any, index: int, column: str = "prompt") -> Prompt:
    """The validated prompt of row `index`, message contents as text. Raises RowError."""
    if isinstance(value, str) and value.strip():
        return _clean(value, index, column)
    if _is_conversation(value):
        if value[-1]["role"] != "user":
            raise RowError(
                index,
                column,
                f"the conversation ends with the role {value[-1]['role']!r}; it must end with the user, whose turn is "
                "what the teacher's template is filled into.",
            )
        turns = [_message(message, index, column) for message in value]
        if turns[-1]["content"].strip():
            return turns
        raise RowError(index, column, "the user's last turn is empty; fill it in, or drop the row.")
    raise RowError(
        index,
        column,
        f"found {_describe(value)}; expected a non-empty text, or a conversation (a list of messages with 'role' and "
        "'content') that ends with the user.",
    )


def checked_context(value: Any, index: int, column: str = "privileged_context") -> str:
    """The validated privileged context of row `index`, as text. Raises RowError."""
    if _is_conversation(value):
        value = "\n".join(_message(message, index, column)["content"] for message in value)
    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        value = "\n".join(value)
    if isinstance(value, str) and value.strip():
        return _clean(value, index, column)
    raise RowError(
        index,
        column,
        f"found {_describe(value)}; expected a non-empty text, a list of texts or a list of messages. Without it the "
        "teacher knows no more than the student: fill it in, or drop the row.",
    )


def optional_context(value: Any, index: int) -> str | None:
    """The same; None if there is none. Raises RowError."""
    is_missing = not value or (isinstance(value, str) and not value.strip())
    return None if is_missing else checked_context(value, index)


def _tools(value: Any, prompt: Prompt, index: int) -> list[dict[str, Any]] | None:
    """The tools of a row: a list of schemas, or its JSON text."""
    if isinstance(value, str) and value.strip():
        with suppress(ValueError, RecursionError):  # invalid JSON stays a text, and is rejected below
            value = json.loads(value)
    if not value and (value is None or isinstance(value, str | list)):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(index, "tools", f"found {_describe(value)}; expected a list of function schemas, or its JSON.")
    if isinstance(prompt, str):
        raise RowError(index, "tools", "'prompt' is a text, and tools need a conversation; make it one.")
    return _without_nones(value)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and ("content" in message or "tool_calls" in message)
            for message in value
        )
    )


def _message(message: Mapping[str, Any], index: int, column: str) -> Message:
    """The message with its content as text, without fields that are None: table formats add those that only other
    rows have."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    try:
        text = message_text(content)
    except TypeError as error:
        raise RowError(index, column, f"{error}.") from None
    return {**_without_nones(dict(message)), "content": _clean(text, index, column)}


def _without_nones(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nones(part) for name, part in value.items() if part is not None}
    return [_without_nones(part) for part in value] if isinstance(value, list) else value


def _clean(text: str, index: int, column: str) -> str:
    """The text; raises RowError for characters that tokenizers or files cannot hold."""
    place = text.find("\0")
    if place >= 0:
        raise RowError(index, column, f"found a NUL character at position {place}; remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            index,
            column,
            f"found half of a surrogate pair at position {error.start}; it is not valid text; remove it.",
        ) from None
    return text


def _describe(value: Any) -> str:
    if value is None or (isinstance(value, str | list) and not value):
        return "nothing" if value is None else f"an empty {'text' if isinstance(value, str) else 'list'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
