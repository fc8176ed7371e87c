"""Splits prompts into text spans (special tokens, context, truncated text) and completions into tokens."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedTokenizerBase

from sdft_ds.data.batch import Completion, LossMask, Rollout, collate
from sdft_ds.data.prompts import PromptBuilder, RenderedPrompt, Span
from sdft_ds.metrics.completions import token_texts
from sdft_ds.preview.row import Look


@dataclass(frozen=True)
class TextSpan:
    """A span of a prompt. part: "context", "cut" (no longer in the prompt) or "". special: a special token."""

    text: str
    part: str = ""
    special: bool = False


def prompts_in_pieces(builder: PromptBuilder, look: Look) -> tuple[list[TextSpan], list[TextSpan]]:
    """The student's and the teacher's prompt of a row; without truncation if the row cannot be used."""
    shown = look.taken or look.uncut
    student, teacher = builder.spans(shown)
    return _in_pieces(builder, shown.student, student, look), _in_pieces(builder, shown.teacher, teacher, look)


def _in_pieces(builder: PromptBuilder, prompt: RenderedPrompt, spans: list[Span], look: Look) -> list[TextSpan]:
    names = special_tokens(builder.tokenizer)
    places = zip(builder.offsets(prompt), prompt.ids, strict=True)
    special = [(place, names[token]) for place, token in places if token in names]
    contexts = [(span.start, span.end) for span in spans if span.name == "privileged_context"]
    cuts = [(end, look.cut_context) for _, end in contexts]
    cuts += [(span.start, look.cut_question) for span in spans if span.name == "prompt"]
    edges = {0, len(prompt.text), *(at for place, _ in special for at in place)}
    edges |= {at for place in contexts for at in place} | {at for at, _ in cuts}
    found = [TextSpan(name, special=True) for (start, end), name in special if start == end]
    for start, end in pairwise([*sorted(edges), len(prompt.text)]):
        found += [TextSpan(text, "cut") for at, text in cuts if at == start and text]
        if start < end:
            part = "context" if _within(start, end, contexts) else ""
            is_special = _within(start, end, [place for place, _ in special])
            found.append(TextSpan(prompt.text[start:end], part, is_special))
    return found


def _within(start: int, end: int, places: list[tuple[int, int]]) -> bool:
    return any(low <= start and end <= high for low, high in places)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: text} of the special tokens: those of chat templates, BOS, EOS and the like."""
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


@dataclass(frozen=True)
class Sample:
    """A completion as token texts. in_loss: which are loss tokens. truncated: no EOS within the limit."""

    tokens: list[str]
    in_loss: list[bool]
    truncated: bool


def sample(look: Look, tokenizer: PreTrainedTokenizerBase, mask: LossMask, longest: int) -> Sample:
    """The context as a stand-in for a completion of at most `longest` tokens, with its loss tokens marked."""
    ids = tokenizer(look.example.privileged_context or "", add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    completion = Completion(ids[:longest], truncated=len(ids) > longest)
    rollout = Rollout(0, look.taken, completion)
    batch = collate([rollout], mask, 0, torch.device("cpu"))  # one row is not padded
    counted = set((batch.student.positions_N + 1 - len(look.taken.student.ids)).tolist())
    in_loss = [i in counted for i in range(len(completion.ids))]
    return Sample(token_texts(tokenizer, completion.ids), in_loss, completion.truncated)
