"""One row as training's own code handles it: its prompts, what is truncated, or why it is refused."""

from dataclasses import dataclass

from sdft_ds.data.prompts import PromptBuilder, PromptPair, PromptTooLong, user_text
from sdft_ds.data.rows import Example


@dataclass(frozen=True)
class Look:
    """One row of a data set.

    uncut: its prompts without limits. taken: those that training uses; None if it refuses the row, with the reason in
    `refusal`. cut_question, cut_context: the truncated text. context_tokens: of the full context by itself.
    """

    index: int
    example: Example
    uncut: PromptPair
    taken: PromptPair | None
    refusal: str
    cut_question: str
    cut_context: str
    context_tokens: int


class Looker:
    """Renders rows with training's prompt builder."""

    def __init__(self, builder: PromptBuilder):
        self.builder = builder
        self.unlimited = builder.unlimited()

    def look(self, example: Example, index: int) -> Look:
        context = example.privileged_context or ""  # none where it is made after the rollout
        uncut, refusal = self.unlimited.build(example, index), ""
        taken: PromptPair | None = uncut
        if self._is_over(uncut):
            try:
                taken = self.builder.build(example, index)
            except PromptTooLong as error:
                taken, refusal = None, str(error)
        cut_question = cut_context = ""
        if taken is not None:
            whole, question = user_text(uncut.student.prompt), user_text(taken.student.prompt)
            cut_question = whole[: len(whole) - len(question)]
            cut_context = context[len(self.builder.context_left(taken)) :] if context else ""
        tokens = self.builder.tokenizer(context, add_special_tokens=False)["input_ids"]
        return Look(index, example, uncut, taken, refusal, cut_question, cut_context, len(tokens))

    def _is_over(self, uncut: PromptPair) -> bool:
        limits = (self.builder.max_prompt_length, self.builder.max_teacher_prompt_length)
        lengths = (len(uncut.student.ids), len(uncut.teacher.ids))
        return any(limit is not None and length > limit for limit, length in zip(limits, lengths, strict=True))
