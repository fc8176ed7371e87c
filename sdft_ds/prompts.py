"""An Example -> the student's and the teacher's prompt; owns the templates and the truncation.

The teacher sees the same question as the student, cut in the same way, and the privileged context around it. What is
cut is always the user's text, before templating: the prompt loses its beginning, the context its end. Tokens of a chat
template or of the teacher's template are never cut, nor are the earlier messages of a conversation.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from sdft_ds.rows import Example, Prompt, check_columns, example_from_row

TRUNCATIONS = ("truncate", "drop", "error")
PLACEHOLDERS = ("prompt", "privileged_context")


class PromptTooLong(ValueError):
    """A prompt over its limit, under truncation='error' or 'drop', or one that no cut of the user's text can mend."""


@dataclass(frozen=True)
class RenderedPrompt:
    """One prompt: as given to the chat template, as the text the model reads, and as token ids."""

    prompt: Prompt
    text: str
    ids: list[int]


@dataclass(frozen=True)
class PromptPair:
    student: RenderedPrompt
    teacher: RenderedPrompt


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a teacher template into (literal, placeholder or None) pieces.

    Parsed once, and filled by concatenation: values are inserted verbatim, whatever braces they hold. Raises
    ValueError for a missing or unknown placeholder, or for one with an attribute, an index, a conversion or a format.
    """
    where = "teacher_prompt_template"
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Literal braces are written doubled: {{{{ and }}}}.") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"{where}: unknown placeholder {{{shown}}}; only {{prompt}} and {{privileged_context}} are filled in. "
                "Literal braces are written doubled."
            )
    found = [name for _, name, _, _ in pieces]
    for name in PLACEHOLDERS:
        if name not in found:
            raise ValueError(f"{where} lacks the placeholder {{{name}}}.")
    return [(literal, name) for literal, name, _, _ in pieces]


class PromptBuilder:
    """Renders and tokenizes both prompts of an example within their limits; counts what it cut in `counts`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_prompt_length: int | None,
        max_teacher_prompt_length: int | None,
        truncation: str = "truncate",
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.template = parse_template(template)
        self.max_prompt_length = max_prompt_length
        self.max_teacher_prompt_length = max_teacher_prompt_length
        self.truncation = truncation
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.counts = Counter()

    def build(self, example: Example, index: int) -> PromptPair:
        """Both prompts of row `index`. Raises PromptTooLong where the policy or the lengths forbid a cut."""
        student = self._fit(
            _user_text(example.prompt),
            lambda text: _with_user_text(example.prompt, text),
            self.max_prompt_length,
            keep="end",
            what=f"Row {index}: the student's prompt (max_prompt_length)",
            counter="student_prompts_cut",
        )
        question = _user_text(student.prompt)
        teacher = self._fit(
            example.privileged_context,
            lambda text: _with_user_text(example.prompt, self._fill(question, text)),
            self.max_teacher_prompt_length,
            keep="start",
            what=f"Row {index}: the teacher's prompt (max_teacher_prompt_length)",
            counter="teacher_prompts_cut",
        )
        return PromptPair(student, teacher)

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """Plain text as it is, with the tokenizer's own special tokens; a conversation through the chat template."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            # A tokenizer that closes every text with EOS would have the model answer after the end.
            while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            return RenderedPrompt(prompt, prompt, ids)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The prompt is a conversation, but the tokenizer {self.tokenizer.name_or_path!r} has no chat "
                "template: use plain-text prompts, or set tokenizer.chat_template."
            )
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        return RenderedPrompt(prompt, text, self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fill(self, question: str, context: str) -> str:
        values = {"prompt": question, "privileged_context": context}
        return "".join(literal + (values[name] if name else "") for literal, name in self.template)

    def _fit(
        self, text: str, compose: Callable[[str], Prompt], limit: int | None, keep: str, what: str, counter: str
    ) -> RenderedPrompt:
        """The prompt composed with the longest end (or start) of the text that fits into `limit` tokens."""
        rendered = self.render(compose(text))
        length = len(rendered.ids)
        if limit is None or length <= limit:
            return rendered
        if self.truncation != "truncate":
            raise PromptTooLong(
                f"{what} has {length} tokens, over the limit of {limit}. Raise the limit, shorten the text, or choose "
                "truncation='truncate' or 'drop'."
            )
        # Cutting by the tokens of the text alone can leave one too many once it is rendered: cut until it fits.
        while len(rendered.ids) > limit and text:
            text = self._without_tokens(text, len(rendered.ids) - limit, keep)
            rendered = self.render(compose(text))
        if len(rendered.ids) > limit or (keep == "end" and not text):
            raise PromptTooLong(
                f"{what} has {length} tokens, over the limit of {limit}, and cutting the user's text cannot mend it: "
                "the template and the other messages are never cut. Raise the limit."
            )
        self.counts[counter] += 1
        return rendered

    def _without_tokens(self, text: str, over: int, keep: str) -> str:
        """The text without its first (keep='end') or last `over` tokens, and shorter by a character at least."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for kept in range(len(spans) - over, 0, -1):
            shorter = text[spans[-kept][0] :] if keep == "end" else text[: spans[kept - 1][1]]
            if shorter != text:  # the tokens of one multi-byte character share its span
                return shorter
        return ""


def _user_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _with_user_text(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def usable_rows(dataset: Dataset, name: str, builder: PromptBuilder) -> Dataset:
    """Validate every row before the first step; with truncation='drop', leave out those that are too long.

    Raises RowError or PromptTooLong for a row that cannot be used, ValueError for a data set without any that can.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name} is an IterableDataset: only train_dataset can be a stream.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    check_columns(list(dataset[0]))
    kept = []
    for index, row in enumerate(dataset):
        try:
            builder.build(example_from_row(row, index), index)
        except PromptTooLong:
            if builder.truncation != "drop":
                raise
            continue
        kept.append(index)
    dropped, cut = len(dataset) - len(kept), dict(builder.counts)
    builder.counts.clear()
    if not kept:
        raise ValueError(f"{name}: all {dropped} rows are over max_prompt_length or max_teacher_prompt_length.")
    if dropped or cut:
        warnings.warn(
            f"{name}: of {len(dataset)} rows {dropped} are dropped, {cut.get('student_prompts_cut', 0)} lose the "
            f"beginning of the prompt and {cut.get('teacher_prompts_cut', 0)} the end of the context, because of "
            "max_prompt_length and max_teacher_prompt_length.",
            stacklevel=3,
        )
    return dataset.select(kept) if dropped else dataset
