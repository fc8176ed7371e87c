"""Can this teacher teach? Compares the model's answers with and without the privileged context, before training."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from sdft_ds.data.batch import Completion, Rollout
from sdft_ds.data.prompts import PromptPair, RenderedPrompt
from sdft_ds.data.rows import Example, example_from_row
from sdft_ds.trainer import SDFTTrainer

# Nats per token below which a context does not help. On SmolLM2-135M contexts that say the answer gain 1.5 to 1.9, and
# others -0.3 to 0.1.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class TeacherCheck:
    """Of some rows, the greedy answers of teacher and student, without and with the context.

    same: rows whose two answers are equal. gain: how much likelier the teacher's answers are with the context than
    without, nats per token, the mean over rows. golden: how much likelier the golden response of each row is with its
    context than without, and than with the context of another row, whichever is less: any context makes an answer that
    says something likelier to a model that would decline. Empty without golden responses.
    """

    rows: int
    same: int
    gain: float
    golden: dict[int, float]

    @property
    def lines(self) -> list[str]:
        """The findings and the verdict, in words."""
        said = [
            f"Teacher check, {self.rows} rows: with the context the model's greedy answer is another one in "
            f"{self.rows - self.same} of them, and {self.gain:.2g} nats per token likelier than without."
        ]
        if self.golden:
            mean = sum(self.golden.values()) / len(self.golden)
            said.append(f"By its own context a golden response gets {mean:.2g} nats per token likelier.")
        return [*said, self.verdict]

    @property
    def verdict(self) -> str:
        if self.gain < LEAST_GAIN or self.same == self.rows:
            return (
                "This teacher has nothing to teach: it answers as the student does. Look at the rows' contexts and at "
                "teacher_prompt_template."
            )
        silent = [index for index, gain in self.golden.items() if gain < LEAST_GAIN]
        if self.golden and len(silent) == len(self.golden):
            return (
                "This teacher does not teach the golden responses: the context makes none likelier. It changes "
                "the answers, but not towards them."
            )
        if silent:
            named = ", ".join(map(str, silent[:10])) + (" and more" if len(silent) > 10 else "")
            return f"This teacher can teach, but not from the context of row {named}: it does not help."
        if self.golden:
            return "This teacher can teach: the context makes the golden responses likelier."
        return (
            "This teacher answers otherwise with the context; whether better, only you can see: read the answers, or "
            "give the rows a golden response."
        )


def check(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]], golden: dict[int, str]) -> TeacherCheck:
    """rows: by index; golden: response of the rows that have one. Trains nothing."""
    prompts, tokenizer = trainer.prompts, trainer.prompts.tokenizer
    examples = {index: example_from_row(row, index) for index, row in rows.items()}
    pairs = {index: prompts.build(example, index) for index, example in examples.items()}
    with trainer.prepared(), torch.no_grad():
        trainer.check_head()
        answers = {}
        for side in ("teacher", "student"):
            ids = [getattr(pair, side).ids for pair in pairs.values()]
            made = trainer.rollouts.generate(ids, [""] * len(ids), do_sample=False)
            answers[side] = [completion.ids for completion in made]
        gains = _gains(trainer, list(pairs.values()), answers["teacher"])
        responses = {index: tokenizer(golden[index], add_special_tokens=False)["input_ids"] for index in golden}
        responses = {index: ids for index, ids in responses.items() if ids}
        asked = [pairs[index] for index in responses]
        found = _gains(trainer, asked, list(responses.values()))
        others = _with_the_next_context(trainer, {index: examples[index] for index in responses})
        against = _gains(
            trainer, [PromptPair(o, p.teacher) for o, p in zip(others, asked, strict=True)], list(responses.values())
        )
        found = [min(gains) for gains in zip(found, against, strict=True)]
    return TeacherCheck(
        rows=len(pairs),
        same=sum(a == b for a, b in zip(*answers.values(), strict=True)),
        gain=sum(gains) / len(gains),
        golden=dict(zip(responses, found, strict=True)),
    )


def _with_the_next_context(trainer: SDFTTrainer, examples: dict[int, Example]) -> list[RenderedPrompt]:
    """Each row's teacher prompt with the context of the next row that has another one; the student's prompt where no
    row does, or the row has a teacher prompt of its own."""
    found, listed = [], list(examples.values())
    for at, (index, example) in enumerate(examples.items()):
        following = (each for each in (*listed[at + 1 :], *listed[:at]) if each.teacher_prompt is None)
        contexts = (each.privileged_context for each in following)
        other = next((text for text in contexts if text != example.privileged_context), None)
        if other is None or example.teacher_prompt is not None:
            found.append(trainer.prompts.build(example, index).student)
        else:
            found.append(trainer.prompts.build(replace(example, privileged_context=other), index).teacher)
    return found


def _gains(trainer: SDFTTrainer, pairs: list[PromptPair], answers: list[list[int]]) -> list[float]:
    """Log-probability of each answer with the context minus that without, per token, in nats."""
    if not pairs:
        return []
    scorer = trainer.objective.scorer(trainer.args.device)
    totals = []
    for side in ("teacher", "student"):
        rendered = [getattr(pair, side) for pair in pairs]
        rollouts = [
            Rollout(i, PromptPair(prompt, prompt), Completion(ids, truncated=False))
            for i, (prompt, ids) in enumerate(zip(rendered, answers, strict=True))
        ]
        totals.append([values.mean().item() for values in scorer.student_log_probs(rollouts)])
    return [told - untold for told, untold in zip(*totals, strict=True)]
