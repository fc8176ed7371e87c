"""Completions as tokens coloured by divergence; page.js shows the student's and the teacher's top tokens on hover.

Its data is JSON after each completion: {"words": [str], "tokens": [[divergence | null, sampled word,
[word, p, ...] of the student, [word, p, ...] of the teacher], ...]}, with words as indices and p in ten-thousandths,
because text would be four times as large.
"""

import json
from bisect import bisect
from html import escape

from sdft_ds.metrics.run_folder import Completion, Run
from sdft_ds.report.page import missing
from sdft_ds.report.scales import as_json_number, number

LEVELS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats per token; lower bounds of the colours d1 to d6
NEWLINE, BROKEN = "\n", "⏎\n"
MOST_STEPS, MOST_COMPLETIONS, MOST_TOKENS = 8, 40, 1000  # the page stays below about 5 MB


def completions(run: Run) -> str:
    """At most 40 completions of at most 8 steps, newest first, with a note on how many were logged."""
    if not run.completions:
        return missing("No completions were logged: set log_completions.")
    steps = list(run.completions)
    if len(steps) > MOST_STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
    shown = [c for step in reversed(steps) for c in run.completions_of(step, MOST_COMPLETIONS // len(steps))]
    rows = sum(count for _, count in run.completions.values())
    return (
        f'<p class="note">{len(shown)} of {rows} logged completions, of {len(steps)} of {len(run.completions)} steps. '
        "A token is coloured by how far the student is from the teacher at its place; point at it, or use the arrow "
        "keys, for what both held most likely.</p>"
        + levels()
        + "".join(_completion(c, is_open=i == 0) for i, c in enumerate(shown))
    )


def levels() -> str:
    """The colour legend."""
    names = ("below 0.01", *(f"from {bound:g}" for bound in LEVELS))
    colours = "".join(f'<b class="d{i}">{name}</b>' for i, name in enumerate(names))
    return f'<p class="levels">nats per token:&nbsp; {colours}<b class="dx">not in the loss</b></p>'


def level(divergence: float | None) -> str:
    """The page.css class for a token's divergence in nats; nan gets the highest."""
    return "dx" if divergence is None else f"d{bisect(LEVELS, divergence)}"


def _completion(c: Completion, is_open: bool) -> str:
    figures = [f"step {c.step}", f"{c.length} tokens" + (", cut off" if c.truncated else "")]
    if c.divergence_mean is not None:
        figures.append(f"{number(c.divergence_mean)} nats/token")
    return (
        f"<details{' open' if is_open else ''}><summary>"
        + "".join(f'<span class="figure">{figure}</span>' for figure in figures)
        + f'<span class="said">{escape(c.completion[:200])}</span></summary>'
        f'<div class="prompts"><div><h4>The student sees</h4><pre>{escape(c.prompt)}</pre></div>'
        f"<div><h4>The teacher sees</h4><pre>{escape(c.teacher_prompt)}</pre></div></div>"
        f"<h4>The student answers</h4>{coloured(c)}</details>"
    )


def coloured(c: Completion) -> str:
    """The first 1,000 tokens of a completion, coloured, and the JSON that page.js reads."""
    cut = "" if len(c.tokens) <= MOST_TOKENS else f"The first {MOST_TOKENS} of {len(c.tokens)} tokens."
    return (
        f'<p class="tokens">{_tokens(c)}</p><script type="application/json">{_tops(c)}</script>'
        + (f'<p class="note">{cut}</p>' if cut else "")
    )  # fmt: skip


def _tokens(c: Completion) -> str:
    tokens = zip(c.tokens[:MOST_TOKENS], c.divergence, strict=False)
    return "".join(
        f'<i class="{level(divergence)}" tabindex="{-1 if i else 0}">{escape(text).replace(NEWLINE, BROKEN)}</i>'
        for i, (text, divergence) in enumerate(tokens)
    )


def _tops(c: Completion) -> str:
    words: dict[str, int] = {}

    def numbered(word: str) -> int:
        return words.setdefault(word, len(words))

    def flat(top: list[dict]) -> list[int]:
        return [part for entry in top for part in (numbered(entry["token"]), round(entry["p"] * 10000))]

    tokens = [
        [None if d is None else as_json_number(d), numbered(text), flat(student), flat(teacher)]
        for text, d, student, teacher in list(zip(c.tokens, c.divergence, c.student_top, c.teacher_top, strict=True))[
            :MOST_TOKENS
        ]
    ]
    text = json.dumps({"words": list(words), "tokens": tokens}, separators=(",", ":"))
    return text.replace("<", "\\u003c")
