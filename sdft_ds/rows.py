"""A row of a data set -> a validated Example: what the student is asked, and what the teacher is told besides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]

COLUMNS = ("prompt", "privileged_context")


@dataclass(frozen=True)
class Example:
    """prompt: plain text, or a conversation that ends with the user; privileged_context: text for the teacher only."""

    prompt: Prompt
    privileged_context: str


class RowError(ValueError):
    """A row that cannot be used; the message names the row, the column and the remedy."""


def check_columns(found: list[str]) -> None:
    """Raise ValueError unless both columns are there; lists what was found."""
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        raise ValueError(
            f"The data set has the columns {', '.join(found) or '(none)'}, and lacks {', '.join(missing)}. Needed are "
            f"{' and '.join(COLUMNS)}: rename a column, or map it with --prompt_column, --privileged_context_column "
            "or --golden_response_column."
        )


def example_from_row(row: Mapping[str, Any], index: int) -> Example:
    """Validate one row. Raises RowError naming row `index` and the column."""
    check_columns(list(row))
    return Example(
        prompt=checked_prompt(row["prompt"], index),
        privileged_context=_context(row["privileged_context"], index),
    )


def message_text(content: Any) -> str:
    """The text of a message's content: a string, or the text parts of a list joined by spaces.

    Raises TypeError for anything else, such as an image.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        others = sorted({str(part.get("type")) for part in content if part.get("type") != "text"})
        if others:
            raise TypeError(f"content parts of type {', '.join(others)}; only text is supported")
        return " ".join(part["text"] for part in content)
    raise TypeError(f"content of type {type(content).__name__}; text or a list of text parts is needed")


def checked_prompt(value: Any, index: int) -> Prompt:
    """The prompt of row `index`, contents as text. Raises RowError."""
    if isinstance(value, str) and value:
        return value
    if _is_conversation(value):
        if value[-1]["role"] != "user":
            raise RowError(
                f"Row {index}, column 'prompt': the conversation ends with the role {value[-1]['role']!r}; it must "
                "end with the user, whose turn is what the teacher's template is filled into."
            )
        return [{**message, "content": _text(message["content"], index, "prompt")} for message in value]
    raise RowError(
        f"Row {index}, column 'prompt': found {_describe(value)}; needed is a non-empty text, or a conversation "
        "(a list of messages with 'role' and 'content') that ends with the user."
    )


def _context(value: Any, index: int) -> str:
    if _is_conversation(value):
        value = "\n".join(_text(message["content"], index, "privileged_context") for message in value)
    if isinstance(value, str) and value:
        return value
    raise RowError(
        f"Row {index}, column 'privileged_context': found {_describe(value)}; needed is a non-empty text or a list of "
        "messages. Without it the teacher knows no more than the student: fill it in, or drop the row."
    )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message and "content" in message for message in value)
    )


def _text(content: Any, index: int, column: str) -> str:
    try:
        return message_text(content)
    except TypeError as error:
        raise RowError(f"Row {index}, column {column!r}: {error}.") from None


def _describe(value: Any) -> str:
    if value is None or (isinstance(value, str | list) and not value):
        return "nothing" if value is None else f"an empty {'text' if isinstance(value, str) else 'list'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
