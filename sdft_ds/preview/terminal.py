"""A preview on the terminal. Marks repeat most of what colours show, for files and terminals without colour."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdft_ds.metrics.run_folder import Completion
from sdft_ds.preview import wording
from sdft_ds.preview.preview import Preview, ShownRow
from sdft_ds.preview.spans import TextSpan
from sdft_ds.report.token_view import LEVELS, level

SPECIAL = "magenta"
CONTEXT, CUT, SKIPPED = ("⟦", "⟧", "black on bright_cyan"), ("✂⟨", "⟩", "strike red"), ("⟨", "⟩", "dim underline")
# As in page.css.
COLOURS = {
    "d0": "", "d1": "#1b1f26 on #fff2cf", "d2": "#1b1f26 on #fedf9c", "d3": "#1b1f26 on #fdbf6a",
    "d4": "#1b1f26 on #f8924a", "d5": "#ffffff on #c9431f", "d6": "#ffffff on #86150f",
}  # fmt: skip
MOST_CHARACTERS = 1200  # of a span of a prompt; the middle of a longer one is omitted
MOST_TOKENS = 10  # rows of a table of tokens
# A terminal executes control characters, and a data set may contain any.
HARMLESS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
HARMLESS |= dict.fromkeys(range(0x7F, 0xA0), "\ufffd")


def show(view: Preview, console: Console) -> None:
    for line in view.notes:
        console.print(Text(line, "yellow"))
    console.print(Text(" · ".join(view.facts), "bold"))
    console.print(_legend(view))
    for shown in view.rows:
        _show_row(view, shown, console)
    _show_statistics(view, console)
    for line in view.verdict:
        console.print(Text(line, "bold"))


def _legend(view: Preview) -> Text:
    legend = Text("special token", SPECIAL)
    for name, mark in (("context", CONTEXT), ("cut", CUT), ("not in the loss", SKIPPED)):
        legend.append("  ").append_text(_marked(name, mark))
    if any(shown.scored for shown in view.rows):
        legend.append("\nnats per token:")
        for bound in LEVELS:
            legend.append(" ").append(f" {bound:g} ", COLOURS[level(bound)])
    return legend


def _show_row(view: Preview, shown: ShownRow, console: Console) -> None:
    console.print()
    console.rule(Text(f"Row {shown.look.index}", "bold"), align="left")
    if said := wording.cuts(shown):
        console.print(Text(said, "red"))
    for side, pieces in (("student", shown.student), ("teacher", shown.teacher)):
        _heading(console, f"The {side} sees", wording.size(view, shown, side))
        console.print(_prompt(pieces))
    if shown.scored is not None:
        _heading(console, "The student answers", wording.completion(shown))
        console.print(_tokens(shown.scored.tokens, [level(d) for d in shown.scored.divergence]))
        console.print(_furthest(shown.scored))
    elif shown.sample is not None:
        _heading(console, wording.STAND_IN, wording.completion(shown))
        classes = ["d0" if counts else "dx" for counts in shown.sample.in_loss]
        console.print(_tokens(shown.sample.tokens, classes))


def _heading(console: Console, what: str, said: str) -> None:
    console.print(Text(f"{what}: ", "bold").append(said, "not bold"))


def _prompt(pieces: Sequence[TextSpan]) -> Text:
    """Adjacent spans of the same part (context or cut) share one pair of marks."""
    text, part = Text(), ""
    for piece in [*pieces, TextSpan("")]:
        if piece.part != part:
            text.append_text(_edge(part, 1)).append_text(_edge(piece.part, 0))
            part = piece.part
        style = SPECIAL if piece.special else {"context": CONTEXT[2], "cut": CUT[2]}.get(part, "")
        text.append(_harmless(_without_middle(piece.text)), style)
    return text


def _edge(part: str, side: int) -> Text:
    return Text({"context": CONTEXT, "cut": CUT}[part][side]) if part else Text()


def _without_middle(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} …({len(text) - 2 * half:,} characters)… {text[-half:]}"


def _harmless(text: str) -> str:
    return text.translate(HARMLESS)


def _marked(text: str, mark: tuple[str, str, str]) -> Text:
    start, end, style = mark
    return Text(start).append(text, style).append(end)


def _tokens(tokens: Sequence[str], classes: Sequence[str]) -> Text:
    """Tokens in the colours of their classes; those not in the loss (dx) between marks."""
    text, skipping = Text(), False
    for token, name in [*zip(tokens, classes, strict=True), ("", "")]:
        if (name == "dx") != skipping:
            text.append(SKIPPED[skipping])
            skipping = name == "dx"
        text.append(_harmless(token), SKIPPED[2] if skipping else COLOURS.get(name, ""))
    return text


def _furthest(scored: Completion) -> Table:
    """The loss tokens with the largest divergence, by position, with the top tokens of student and teacher."""
    places = [i for i, divergence in enumerate(scored.divergence) if divergence is not None]
    kept = sorted(sorted(places, key=lambda i: -scored.divergence[i])[:MOST_TOKENS])
    title = None if len(kept) == len(places) else f"The {len(kept)} furthest of {len(places)} loss tokens"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in ("", "token", "nats", "student's most likely", "teacher's most likely"):
        table.add_column(name, justify="right" if name in ("", "nats") else "left")
    for i in kept:
        divergence = scored.divergence[i]
        table.add_row(
            str(i + 1),
            Text(_visible(scored.tokens[i])),
            Text(f"{divergence:.3f}", COLOURS[level(divergence)]),
            Text(_likeliest(scored.student_top[i])),
            Text(_likeliest(scored.teacher_top[i])),
        )
    return table


def _likeliest(top: list[dict]) -> str:
    return "  ".join(f"{_visible(entry['token'])} {entry['p']:.2f}" for entry in top if entry["p"] >= 0.005)


def _visible(text: str) -> str:
    return _harmless(text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")) or "∅"


def _show_statistics(view: Preview, console: Console) -> None:
    console.print()
    console.rule(Text("The data set", "bold"), align="left")
    table = Table(*wording.LENGTHS_HEAD, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in wording.lengths(view):
        table.add_row(*row)
    console.print(table)
    for line in wording.verdicts(view):
        console.print(Text(line))
