"""A preview as one self-contained HTML page."""

from collections.abc import Sequence
from html import escape

from sdft_ds.preview import wording
from sdft_ds.preview.preview import Preview, ShownRow
from sdft_ds.preview.spans import Sample, TextSpan
from sdft_ds.report.charts import histogram
from sdft_ds.report.page import document, grid, missing, table
from sdft_ds.report.token_view import coloured, levels

TITLE = "What training will see"
FOOT = "Written by python -m sdft_ds.preview. Lengths are those before any cut."


def render(view: Preview) -> str:
    head = f'<h1>{TITLE}</h1><p class="facts">{escape(" · ".join(view.facts))}</p>'
    head += "".join(missing(note) for note in view.notes)
    head += "".join(f"<p>{escape(line)}</p>" for line in view.verdict)
    sections = {f"Row {shown.look.index}": _row(view, shown) for shown in view.rows}
    return document(TITLE, head + _legend(view), {**sections, "Data set": _data_set(view)}, FOOT)


def _legend(view: Preview) -> str:
    scored = any(shown.scored for shown in view.rows)
    return (
        '<p class="levels">prompts:&nbsp; <b class="special">special token</b> <mark>the context</mark> '
        f"<del>cut</del></p>{levels() if scored else ''}"
    )


def _row(view: Preview, shown: ShownRow) -> str:
    cuts = wording.cuts(shown)
    sides = "".join(
        f"<div><h4><b>The {side} sees</b> {escape(wording.size(view, shown, side))}</h4>"
        f'<pre class="whole">{_pieces(pieces)}</pre></div>'
        for side, pieces in (("student", shown.student), ("teacher", shown.teacher))
    )
    return f'{missing(cuts) if cuts else ""}<div class="prompts">{sides}</div>{_completion(shown)}'


def _completion(shown: ShownRow) -> str:
    if shown.sample is None:
        return ""
    said = escape(wording.completion(shown))
    if shown.scored is not None:
        return f"<h4><b>The student answers</b> {said}</h4>{coloured(shown.scored)}"
    return f"<h4><b>{wording.STAND_IN}</b> {said}</h4>{_sample(shown.sample)}"


def _pieces(pieces: Sequence[TextSpan]) -> str:
    tags = {"context": "mark", "cut": "del"}
    found = ""
    for piece in pieces:
        text = escape(piece.text)
        text = f'<b class="special">{text}</b>' if piece.special else text
        found += f"<{tags[piece.part]}>{text}</{tags[piece.part]}>" if piece.part else text
    return found


def _sample(sample: Sample) -> str:
    tokens = zip(sample.tokens, sample.in_loss, strict=True)
    shown = "".join(f'<i class="{"d0" if counts else "dx"}">{escape(text)}</i>' for text, counts in tokens)
    return f'<p class="sample">{shown}</p>'


def _data_set(view: Preview) -> str:
    known = view.statistics.lengths
    charts = [
        histogram(name.capitalize(), "tokens", {"rows": known[what]}, "rows") for what, name in wording.NAMES.items()
    ]
    verdicts = "".join(f"<li>{escape(line)}</li>" for line in wording.verdicts(view))
    return table(wording.LENGTHS_HEAD, wording.lengths(view), "figures") + f"<ul>{verdicts}</ul>" + grid(charts)
