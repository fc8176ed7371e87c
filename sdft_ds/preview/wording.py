"""Text shared by the terminal and the HTML page of a preview."""

from collections.abc import Sequence

from sdft_ds.loss.divergence import Divergence
from sdft_ds.preview.preview import Preview, ShownRow
from sdft_ds.preview.statistics import DROPPED, PERCENTILES
from sdft_ds.report.scales import number

NAMES = {"student": "student's prompt", "teacher": "teacher's prompt", "context": "context by itself"}
LENGTHS_HEAD = ("tokens", *PERCENTILES, "limit", "rows over it")
STAND_IN = "A completion (the context stands in for one; --score generates)"
LISTED = 8  # rows listed by index; the rest are counted


def lengths(view: Preview) -> list[list[str]]:
    """Rows of the table under LENGTHS_HEAD: lengths before truncation."""
    table = []
    for what, name in NAMES.items():
        limit, known = view.limits.get(what), view.statistics.lengths[what]
        over = ["–", "–"] if limit is None else [f"{limit:,}", f"{sum(length > limit for length in known):,}"]
        table.append([name, *(f"{length:,}" for length in view.statistics.percentiles(what)), *over])
    return table


def verdicts(view: Preview) -> list[str]:
    """One sentence for each way in which rows over a limit are handled, and one on duplicate prompts."""
    statistics = view.statistics
    said = [
        f"{len(rows):,} of {statistics.rows:,} rows {fate}: {_listed(rows)}."
        for fate, rows in statistics.fates.items()
        if rows
    ]
    if not said:
        said = [f"All {statistics.rows:,} rows are within the limits."]
    if len(statistics.fates[DROPPED]) == statistics.rows:
        said.append("No row is left: training would not start.")
    if statistics.duplicates:
        pairs = [f"{row} (as {first})" for row, first in statistics.duplicates.items()]
        said.append(f"{len(pairs):,} of {statistics.rows:,} rows have the prompt of an earlier one: {_listed(pairs)}.")
    else:
        said.append("No prompt occurs twice.")
    return said


def _listed(rows: Sequence[int | str]) -> str:
    more = f" and {len(rows) - LISTED:,} more" if len(rows) > LISTED else ""
    return ", ".join(map(str, rows[:LISTED])) + more


def size(view: Preview, shown: ShownRow, side: str) -> str:
    """Length of a side's prompt, before and after truncation, and its limit."""
    uncut = len(getattr(shown.look.uncut, side).ids)
    limit = view.limits[side]
    tokens = uncut if shown.look.taken is None else len(getattr(shown.look.taken, side).ids)
    said = f"{tokens:,} tokens" if tokens == uncut else f"{tokens:,} of {uncut:,} tokens"
    if limit is not None:
        said += f", limit {limit:,}"
    if side == "teacher":
        said += f"; context {shown.look.context_tokens:,}"
    return said


def cuts(shown: ShownRow) -> str:
    """What is truncated, or why the row is refused; "" if neither."""
    look = shown.look
    if look.refusal:
        return look.refusal
    lost = {"the beginning of the question": look.cut_question, "the end of the context": look.cut_context}
    parts = [f"{what} ({len(text):,} characters)" for what, text in lost.items() if text]
    return f"Cut: {' and '.join(parts)}." if parts else ""


def completion(shown: ShownRow) -> str:
    """Length of the completion, number of loss tokens, and mean divergence if scored."""
    if shown.scored is None:
        in_loss, truncated = shown.sample.in_loss, shown.sample.truncated
    else:
        in_loss, truncated = [d is not None for d in shown.scored.divergence], shown.scored.truncated
    said = f"{len(in_loss):,} tokens" + (", cut off" if truncated else "") + f", {sum(in_loss):,} in the loss"
    if shown.scored is not None and shown.scored.divergence_mean is not None:
        said += f", {number(shown.scored.divergence_mean)} nats/token"
    return said


def described(divergence: Divergence) -> str:
    """The divergence in words, e.g. "KL(teacher‖student) over the whole vocabulary"."""
    name = {0.0: "KL(teacher‖student)", 1.0: "KL(student‖teacher)"}.get(
        divergence.alpha, f"Jensen-Shannon, alpha {divergence.alpha:g},"
    )
    support = {
        "full_logits": "over the whole vocabulary",
        "topk_logits": f"over the student's top {divergence.topk}" + (" and the rest" if divergence.add_tail else ""),
        "sampled_token": "estimated on the sampled token",
    }[divergence.mode]
    return f"{name} {support}"
