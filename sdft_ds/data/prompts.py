"""Prompt rendering: Example -> student and teacher prompt; owns templates and truncation.

The teacher sees the student's question, truncated identically, plus the privileged context. Only the user's text is
truncated, before templating: the prompt loses its beginning, the context its end. Tokens of the chat template or of
the teacher's template, earlier messages of a conversation, and a row's own teacher prompt are never truncated.
"""

from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sdft_ds.data.rows import DataError, Example, Prompt, RowError

TRUNCATIONS = ("truncate", "drop", "error")
PLACEHOLDERS = ("prompt", "privileged_context")
# Problems of a row's prompts that do not stop training -> the message for the warning.
PROBLEMS = {
    "text dropped": (
        "the chat template leaves out the user's text (perhaps it takes lists of content parts only): use one that "
        "takes a text as the content of a message."
    ),
    "context dropped": "the chat template leaves out the privileged context of the teacher's prompt.",
    "same prompts": (
        "the teacher's prompt equals the student's, so that it knows no more: see the columns privileged_context and "
        "teacher_prompt."
    ),
    "special tokens": (
        "prompt or context holds special tokens of the tokenizer, as a text does that a chat template rendered "
        "before: give the conversation itself."
    ),
    "plain text": (
        "the prompt is a text, which is read without the chat template that the tokenizer has: for a model that "
        'answers in conversations give [{"role": "user", "content": ...}], as sdft_ds.read_dataset does, and '
        "--prompt_as user on the command line."
    ),
}
MARKS = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode private use characters, which have no meaning


class PromptTooLong(DataError):
    """A prompt over its limit under truncation='error' or 'drop', or one that truncation cannot make fit."""


@dataclass(frozen=True)
class RenderedPrompt:
    """One prompt: the chat template's input, the rendered text, and the token ids.

    tools: the chat template's tools. own: the row's own teacher prompt, rather than the filled template. for_teacher:
    rendered with the teacher's keyword arguments of the chat template.
    """

    prompt: Prompt
    text: str
    ids: list[int]
    tools: list[dict[str, Any]] | None = None
    own: bool = False
    for_teacher: bool = False


@dataclass(frozen=True)
class PromptPair:
    """anchor: the teacher sees the student's prompt, to hold the student to the teacher's answers without context."""

    student: RenderedPrompt
    teacher: RenderedPrompt
    anchor: bool = False

    @property
    def has_context(self) -> bool:
        """Whether the teacher sees another prompt than the student."""
        return self.teacher != self.student


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a text, inserted for the placeholder `name`."""

    name: str
    start: int
    end: int


def parse_template(
    template: str, where: str = "teacher_prompt_template", placeholders: tuple[str, ...] = PLACEHOLDERS
) -> list[tuple[str, str | None]]:
    """Split a template into (literal, placeholder or None) pieces. where: the setting.

    Parsed once and filled by concatenation, so values are inserted verbatim, including any braces. Raises ValueError
    for a missing or unknown placeholder, or one with an attribute, an index, a conversion or a format.
    """
    if not isinstance(template, str):
        raise ValueError(f"{where} must be a text, not {type(template).__name__}.")
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Literal braces are written doubled: {{{{ and }}}}.") from None
    for _, name, spec, conversion in pieces:
        if name is not None and (name not in placeholders or spec or conversion):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            known = " and ".join(f"{{{each}}}" for each in placeholders)
            raise ValueError(
                f"{where}: unknown placeholder {{{shown}}}; only {known} {'is' if len(placeholders) == 1 else 'are'} "
                "filled in. Literal braces are written doubled."
            )
    found = [name for _, name, _, _ in pieces]
    for name in placeholders:
        if name not in found:
            raise ValueError(f"{where} lacks the placeholder {{{name}}}.")
    return [(literal, name) for literal, name, _, _ in pieces]


def fill_template(pieces: list[tuple[str, str | None]], values: dict[str, str]) -> str:
    """The text of a parsed template with these values."""
    return "".join(literal + (values[name] if name else "") for literal, name in pieces)


class PromptBuilder:
    """Renders and tokenizes both prompts of an example within their limits; `counts` has the number truncated.

    teacher_chat_template_kwargs: override chat_template_kwargs in the teacher's prompt. context_optional: rows may
    lack a privileged context, because contexts are made after the rollout; until then both prompts are the same.
    demonstrations: rows and anchors need a text to be trained on (SFT).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_prompt_length: int | None,
        max_teacher_prompt_length: int | None,
        truncation: str = "truncate",
        chat_template_kwargs: dict[str, Any] | None = None,
        teacher_chat_template_kwargs: dict[str, Any] | None = None,
        context_optional: bool = False,
        demonstrations: bool = False,
    ):
        self.tokenizer = tokenizer
        self.template = parse_template(template)
        self.max_prompt_length = max_prompt_length
        self.max_teacher_prompt_length = max_teacher_prompt_length
        self.truncation = truncation
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.teacher_chat_template_kwargs = self.chat_template_kwargs | (teacher_chat_template_kwargs or {})
        self.context_optional = context_optional
        self.demonstrations = demonstrations
        self.counts = Counter()
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = sorted(special | set(tokenizer.all_special_tokens))

    def unlimited(self) -> "PromptBuilder":
        """The same builder without length limits."""
        made = copy(self)
        made.max_prompt_length = made.max_teacher_prompt_length = None
        return made

    def build(self, example: Example, index: int) -> PromptPair:
        """Both prompts of row `index`. Raises PromptTooLong where the policy or the lengths rule out truncation, and
        RowError for a conversation that the chat template rejects."""
        try:
            student = self._fit(
                user_text(example.prompt),
                lambda text: self.render(_with_user_text(example.prompt, text), example.tools),
                self.max_prompt_length,
                keep="end",
                what=f"Row {index}: the student's prompt (max_prompt_length)",
                counter="student_prompts_cut",
            )
            if example.privileged_context is None:
                return PromptPair(student, student, anchor=example.anchor)
            # A row's own teacher prompt has no separate context that could be truncated.
            teacher = self._fit(
                "" if example.teacher_prompt is not None else example.privileged_context,
                lambda text: self._render_for_teacher(example, student, text),
                self.max_teacher_prompt_length,
                keep="start",
                what=f"Row {index}: the teacher's prompt (max_teacher_prompt_length)",
                counter="teacher_prompts_cut",
            )
        except TemplateError as error:
            raise RowError(
                index, "prompt", f"the model's chat template refuses the conversation: {' '.join(str(error).split())}."
            ) from None
        return PromptPair(student, teacher)

    def with_context(
        self, pair: PromptPair, context: str, index: int, fill: Callable[[str, str], str] | None = None,
        limit: int | None = None,
    ) -> PromptPair:  # fmt: skip
        """The pair of row `index` with another privileged context, made after the rollout.

        fill: (question, context) -> the user's text, by default the teacher's template filled in. limit: tokens of the
        teacher's prompt, beside max_teacher_prompt_length. Raises what `build` raises.
        """
        student, fill = pair.student, fill or self._fill
        limits = [each for each in (limit, self.max_teacher_prompt_length) if each is not None]

        def render(text: str) -> RenderedPrompt:
            prompt = _with_user_text(student.prompt, fill(user_text(student.prompt), text))
            return self.render(prompt, student.tools, for_teacher=True)

        try:
            teacher = self._fit(
                context, render, min(limits, default=None), keep="start",
                what=f"Row {index}: the teacher's prompt with its context", counter="teacher_prompts_cut",
            )  # fmt: skip
        except TemplateError as error:
            raise RowError(index, "prompt", f"the model's chat template refuses it: {error}.") from None
        return PromptPair(student, teacher)

    def render(
        self, prompt: Prompt, tools: list[dict[str, Any]] | None = None, for_teacher: bool = False
    ) -> RenderedPrompt:
        """Render plain text unchanged, with the tokenizer's special tokens, or a conversation by the chat template."""
        text = self._text(prompt, tools, for_teacher)
        ids = self._encoded(prompt, text)["input_ids"]
        # Some tokenizers append EOS to every text; the model would have to answer after the end.
        while isinstance(prompt, str) and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        return RenderedPrompt(prompt, text, ids, tools, for_teacher=for_teacher)

    def problems(self, pair: PromptPair) -> list[str]:
        """The PROBLEMS of a row's prompts."""
        student, teacher = pair.student, pair.teacher
        found = []
        if self._is_dropped(student, user_text(student.prompt)):
            found.append("text dropped")
        elif pair.anchor or (self.context_optional and not pair.has_context):
            pass  # has no context, or none yet
        elif not teacher.own and self._is_dropped(teacher, self.context_left(pair)):
            found.append("context dropped")
        elif student.ids == teacher.ids:
            found.append("same prompts")
        texts = user_text(student.prompt), user_text(teacher.prompt)
        if any(token in text for text in texts for token in self.special_tokens):
            found.append("special tokens")
        if isinstance(student.prompt, str) and self.tokenizer.chat_template is not None:
            found.append("plain text")
        return found

    def _is_dropped(self, rendered: RenderedPrompt, part: str) -> bool:
        """Whether the chat template's output ignores a part of the user's text."""
        if part.strip() in rendered.text:
            return False
        mark = next(mark for mark in MARKS if mark not in rendered.text)
        before, _, after = user_text(rendered.prompt).rpartition(part)
        return self._text_with(rendered, f"{before}{mark}{after}") == rendered.text

    def generation_prompt(self, rendered: RenderedPrompt) -> str | None:
        """What the chat template appends after the user's text. None for a plain-text prompt, or if the template
        changes the user's text beyond stripping it."""
        if isinstance(rendered.prompt, str):
            return None
        text = user_text(rendered.prompt)
        mark = next(mark for mark in MARKS if mark not in rendered.text)
        rest = self._text_with(rendered, mark + text).partition(mark)[2]
        return rest.removeprefix(text.rstrip()).lstrip() if rest.startswith(text.rstrip()) else None

    def spans(self, pair: PromptPair) -> tuple[list[Span], list[Span]]:
        """Spans of the question in the student's text, and of question and context in the teacher's.

        Empty if the chat template changes the user's text beyond stripping it, and for a row's own teacher prompt.
        """
        question = Span("prompt", 0, len(user_text(pair.student.prompt)))
        return self._in_text(pair.student, [question]), self._in_text(pair.teacher, self._filled_in(pair))

    def context_left(self, pair: PromptPair) -> str:
        """The context remaining after truncation; empty where there is none, or the row's own teacher prompt."""
        if pair.teacher.own or not pair.has_context:
            return ""
        span = next(span for span in self._filled_in(pair) if span.name == "privileged_context")
        return user_text(pair.teacher.prompt)[span.start : span.end]

    def offsets(self, rendered: RenderedPrompt) -> list[tuple[int, int]]:
        """Character offsets [start, end) in the text of each token of a prompt; (0, 0) for tokens that the tokenizer
        adds. Raises ValueError for a slow tokenizer, which has no offsets."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not give the positions of its tokens in a text: a fast "
                "tokenizer (tokenizer.json) is needed."
            )
        encoded = self._encoded(rendered.prompt, rendered.text, return_offsets_mapping=True)
        return encoded["offset_mapping"][: len(rendered.ids)]

    def _encoded(self, prompt: Prompt, text: str, **options: Any) -> BatchEncoding:
        return self.tokenizer(text, add_special_tokens=isinstance(prompt, str), **options)

    def _text_with(self, rendered: RenderedPrompt, user_text: str) -> str:
        """The text of a prompt if its user's text were another one."""
        return self._text(_with_user_text(rendered.prompt, user_text), rendered.tools, rendered.for_teacher)

    def _text(self, prompt: Prompt, tools: list[dict[str, Any]] | None, for_teacher: bool) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"The prompt is a conversation, but the tokenizer {self.tokenizer.name_or_path!r} has no chat "
                "template: use plain-text prompts, or set tokenizer.chat_template."
            )
        options = self.teacher_chat_template_kwargs if for_teacher else self.chat_template_kwargs
        options = {**options, **({"tools": tools} if tools else {})}
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)

    def _render_for_teacher(self, example: Example, student: RenderedPrompt, context: str) -> RenderedPrompt:
        """The student's (truncated) question with the context, or the row's own teacher prompt."""
        own = example.teacher_prompt
        if own is None:
            filled = self._fill(user_text(student.prompt), context)
            return self.render(_with_user_text(example.prompt, filled), example.tools, for_teacher=True)
        prompt = _with_user_text(example.prompt, own) if isinstance(own, str) else own
        return replace(self.render(prompt, example.tools, for_teacher=True), own=True)

    def _fill(self, question: str, context: str) -> str:
        return fill_template(self.template, {"prompt": question, "privileged_context": context})

    def _filled_in(self, pair: PromptPair) -> list[Span]:
        """Spans of question and context in the user's text of the teacher's prompt."""
        if pair.teacher.own or not pair.has_context:
            return []
        question, text = user_text(pair.student.prompt), user_text(pair.teacher.prompt)
        contexts = sum(name == "privileged_context" for _, name in self.template)
        context_length = (len(text) - len(self._fill(question, ""))) // contexts
        lengths = {"prompt": len(question), "privileged_context": context_length}
        at, spans = 0, []
        for literal, name in self.template:
            at += len(literal)
            if name:
                spans.append(Span(name, at, at + lengths[name]))
                at += lengths[name]
        return spans

    def _in_text(self, rendered: RenderedPrompt, spans: list[Span]) -> list[Span]:
        """Map spans of the user's text to spans of the full rendered text."""
        if isinstance(rendered.prompt, str):
            return spans
        filled, text = user_text(rendered.prompt), rendered.text
        mark = next(mark for mark in MARKS if mark not in text)
        marked = self._text_with(rendered, f"{mark}{filled}{mark}")
        start, end = len(marked.partition(mark)[0]), len(text) - len(marked.rpartition(mark)[2])
        stripped = filled.find(text[start:end]) if start <= end else -1  # characters stripped at its beginning
        if stripped < 0:
            return []
        return [Span(s.name, *(min(max(start + at - stripped, start), end) for at in (s.start, s.end))) for s in spans]

    def _fit(
        self, text: str, render: Callable[[str], RenderedPrompt], limit: int | None, keep: str, what: str, counter: str
    ) -> RenderedPrompt:
        """Render with the longest suffix (keep='end') or prefix of the text that fits into `limit` tokens."""
        rendered = render(text)
        length = len(rendered.ids)
        if limit is None or length <= limit:
            return rendered
        if self.truncation != "truncate":
            raise PromptTooLong(
                f"{what} has {length} tokens, over the limit of {limit}. Raise the limit, shorten the text, or choose "
                "truncation='truncate' or 'drop'."
            )
        # Tokens of the text alone and of the rendered prompt can differ in number: truncate until it fits.
        while len(rendered.ids) > limit and text:
            text = self._without_tokens(text, len(rendered.ids) - limit, keep)
            rendered = render(text)
        if len(rendered.ids) > limit or not text:
            raise PromptTooLong(
                f"{what} has {length} tokens, over the limit of {limit}, and cutting cannot fix it: the template and "
                "all messages but the user's last are never cut, nor is the prompt in the teacher's. Raise the limit; "
                "where the model has no room for more, lower max_prompt_length or max_completion_length."
            )
        self.counts[counter] += 1
        return rendered

    def _without_tokens(self, text: str, over: int, keep: str) -> str:
        """The text without its first (keep='end') or last `over` tokens, at least one character shorter."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for kept in range(len(spans) - over, 0, -1):
            shorter = text[spans[-kept][0] :] if keep == "end" else text[: spans[kept - 1][1]]
            if shorter != text:  # the tokens of one multi-byte character share its span
                return shorter
        return ""


def user_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _with_user_text(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]
