"""Maps the columns of a data set to those that the trainer reads."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from string import Template
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, Value

from sdft_ds.data.loading.formats import (
    AUTO,
    COLUMN_NAMES,
    DEMONSTRATION_TEMPLATE,
    Columns,
    decoded,
    fits,
    messages_in,
    resolve,
    split_demonstration,
    text_of,
    with_roles,
)
from sdft_ds.data.rows import PROBLEM, DataError
from sdft_ds.data.streams import reading

AnyDataset = Dataset | IterableDataset
HEAD = 20  # rows by which a format is recognised
NO_DEMONSTRATION = (
    "the last turn is not the assistant's, with a text, which is the demonstration: add it, or drop the row."
)
MADE = ("prompt", "privileged_context", "teacher_prompt", "tools", "golden_response")
PER_ROW = " chat_template_kwargs is a setting, for all rows alike."


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set are read.

    format: one of FORMATS, or "auto". columns: role -> the column that was named for it. as_user: a plain-text prompt
    becomes the user's turn of a conversation. keep_response: golden responses stay a column. response_teaches: a row
    without a context gets one from its golden response. context_optional: a prompt is enough, because contexts are
    made later, and columns that are not read stay for what makes them.
    """

    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    demonstration_template: str = DEMONSTRATION_TEMPLATE
    as_user: bool = False
    keep_response: bool = False
    response_teaches: bool = True
    context_optional: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a template that lacks $output_text or has unknown placeholders."""
        template = Template(self.demonstration_template)
        names = set(template.get_identifiers())
        if not template.is_valid() or "output_text" not in names or names - {"output_text", "orig_content"}:
            raise ValueError(
                f"demonstration_template {template.template!r}: $output_text is needed, $orig_content is allowed, "
                "nothing else; a literal dollar is written $$."
            )

    def read(self, dataset: AnyDataset, source: str, tell: Callable[[str], None] = lambda text: None) -> AnyDataset:
        """The data set with the columns `prompt` and `privileged_context`, and, if present, `teacher_prompt`, `tools`
        and `golden_response`. Its info names its source, for messages.

        The context is the row's own or else, with response_teaches, the demonstration template filled with its golden
        response. Invalid rows are kept, for the trainer to report. tell: called with the format and the columns that
        are not read.
        """
        found, rows = _head(dataset, source)
        columns = resolve(found, rows, self.format, self.columns, source, self.context_optional)
        columns = self._columns(columns)
        unread = [] if self.context_optional else self._unread(found, columns)
        tell(columns.described)
        if unread:
            tell(f"Columns not read: {', '.join(unread)}." + (PER_ROW if "chat_template_kwargs" in unread else ""))
        if self._makes_conversations(columns) and isinstance(messages_in(rows[0][columns.columns["prompt"]]), str):
            tell(
                "Each plain-text prompt becomes the user's turn of a conversation; to leave it as it is: prompt_as "
                "text."
            )
        return self._mapped(dataset, source, found, columns, anchors=False)

    def read_anchors(
        self, dataset: AnyDataset, source: str, tell: Callable[[str], None] = lambda text: None
    ) -> AnyDataset:
        """The column `prompt`, and `golden_response` with keep_response. A prompt is all that a row needs; what was
        named for the training data counts where the anchors have it."""
        found, rows = _head(dataset, source)
        given = {role: column for role, column in self.columns.items() if column in found}
        if len(found) == 1 and found[0] not in COLUMN_NAMES:
            given = {"prompt": found[0]}
        name = self.format if self.format != AUTO and fits(self.format, found, given) else AUTO
        columns = self._columns(resolve(found, rows, name, given, source, context_optional=True))
        if columns.dialogue or columns.columns["prompt"] != "prompt":
            tell(f"{source}: {columns.described}")
        return self._mapped(dataset, source, found, columns, anchors=True)

    def _columns(self, columns: Columns) -> Columns:
        """Without a system message that nobody asked for where a prompt stays a text."""
        if self.as_user or columns.dialogue or "system" in self.columns:
            return columns
        return Columns(
            columns.format, {role: name for role, name in columns.columns.items() if role != "system"}, False
        )

    def _unread(self, found: list[str], columns: Columns) -> list[str]:
        return [name for name in found if name not in {*columns.columns.values(), *MADE}]

    def _makes_conversations(self, columns: Columns) -> bool:
        return self.as_user or "system" in columns.columns

    def _mapped(
        self, dataset: AnyDataset, source: str, found: list[str], columns: Columns, anchors: bool
    ) -> AnyDataset:
        column, dialogue, keep = columns.columns, columns.dialogue, self.keep_response
        keep = keep and (anchors or dialogue or "golden_response" in column)
        given = [role for role in ("teacher_prompt", "tools") if role in column and not anchors]
        template, conversations = Template(self.demonstration_template), self._makes_conversations(columns)
        stored = isinstance(dataset, Dataset)
        optional = anchors or self.context_optional
        kept = [name for name in found if name not in MADE] if self.context_optional and not anchors else []

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            def value(role: str) -> Any:
                return row.get(column[role]) if role in column else None

            prompt, context, response = map(value, ("prompt", "privileged_context", "golden_response"))
            prompt, problem = with_roles(decoded(prompt) if dialogue else messages_in(prompt))
            response = text_of(messages_in(response))
            if dialogue:
                prompt, last = split_demonstration(prompt)
                response = response or last
                if not (problem or optional or response.strip() or context or value("teacher_prompt")):
                    problem = NO_DEMONSTRATION
            if isinstance(prompt, str) and value("input"):
                prompt = f"{prompt}\n\n{value('input')}"
            if context in (None, "") and response and self.response_teaches:
                context = template.substitute(output_text=response, orig_content=text_of(_last(prompt)))
            if conversations:
                prompt = _conversation(prompt, value("system"))
            mapped = {"prompt": prompt} if anchors else {"prompt": prompt, "privileged_context": context}
            mapped |= {role: value(role) or None for role in given}
            if stored:
                mapped = {name: _json(value) for name, value in mapped.items()}
            mapped |= {name: row[name] for name in kept} | ({PROBLEM: problem} if dialogue else {})
            return mapped | ({"golden_response": response or None} if keep else {})

        how: dict[str, Any] = {"remove_columns": found}
        if stored:
            folders = {os.path.dirname(file["filename"]) for file in dataset.cache_files}
            how |= {"keep_in_memory": not all(os.access(f, os.W_OK) for f in folders)}
            how["desc"] = "Reading anchors" if anchors else "Mapping columns"
            # A table takes the types of its first rows: others may have messages with more keys, parts, or no context.
            texts = [*([PROBLEM] if dialogue else []), *(["golden_response"] if keep else [])]
            values = ["prompt", *([] if anchors else ["privileged_context"]), *given]
            how["features"] = Features(dict.fromkeys(values, Json()) | dict.fromkeys(texts, Value("string")))
            how["features"] |= {name: dataset.features[name] for name in kept}
        with reading(source):
            mapped = dataset.map(convert, **how)
        mapped.info.dataset_name = source if anchors else "; ".join([source, *columns.notes])
        return mapped


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _head(dataset: AnyDataset, source: str) -> tuple[list[str], list[dict[str, Any]]]:
    """(columns, first rows); the columns of a stream may be unknown before it is read."""
    with reading(source):
        rows = list(islice(dataset, HEAD))
    if not rows:
        raise DataError(f"{source} is empty.")
    return dataset.column_names or list(rows[0]), rows


def _conversation(prompt: Any, system: Any) -> Any:
    """The prompt with a text as the user's turn, and with the system message, if there is one, before it; a
    conversation's own system message stays the only one."""
    if isinstance(prompt, str) and prompt.strip():
        prompt = [{"role": "user", "content": prompt}]
    if not system or not isinstance(prompt, list) or _begins_with_system(prompt):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _begins_with_system(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system"


def _last(prompt: Any) -> Any:
    return prompt[-1] if isinstance(prompt, list) and prompt else prompt
