"""Self-contained HTML pages: the content security policy allows no network and no script or style but the page's own.

page.css and page.js are inlined and allowed by their hash, so that HTML in a run's text could not execute even if it
were left unescaped.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

STYLE, SCRIPT = (Path(__file__).with_name(name).read_text() for name in ("page.css", "page.js"))

FOOT = (
    "A curve of many points is drawn twice: faint as it was logged, strong as an average over a 25th of it. Point at "
    "a chart, or use the arrow keys on it, for its values."
)


def document(title: str, head: str, sections: dict[str, str], foot: str = FOOT) -> str:
    """A page: header HTML, table of contents, one section per {heading: HTML}, and a footnote."""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; "
        "base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><header>{head}</header>\n<nav>{links}</nav>\n<main>{body}\n"
        f'<p class="note">{foot}</p></main>\n'
        f'<div id="tip" role="status" hidden></div>\n<script>{SCRIPT}</script></body></html>\n'
    )


@dataclass(frozen=True)
class InlinePage:
    """A page as the output of a notebook's cell, in a frame of its own. text: where HTML is not shown."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        # Not as srcdoc, where the links of the table of contents would open the notebook itself in the frame.
        page = base64.b64encode(self.html.encode()).decode()
        style = "width: 100%; height: 40em; border: 1px solid #8884"
        return f'<iframe sandbox="allow-scripts" style="{style}" src="data:text/html;base64,{page}"></iframe>'

    def __repr__(self) -> str:
        return self.text


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], style: str, groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table of text; the first column names the row. style: figures (right-aligned) or settings. groups: column
    group headings, each with the number of columns it spans."""
    above = "".join(f'<th scope="colgroup" colspan="{columns}">{escape(name)}</th>' for name, columns in groups)
    above = f"<tr>{above}</tr>" if groups else ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table class="{style}"><thead>{above}<tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def missing(text: str) -> str:
    """A note on missing data and how to get it."""
    return f'<p class="missing">{escape(text)}</p>'


def tiles(entries: dict[str, str]) -> str:
    """Large key figures: {label: value}."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries.items())
    return f'<dl class="tiles">{cells}</dl>'


def grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def settings(values: dict[str, Any]) -> str:
    """A table of settings; a long one gets a filter field above it."""
    rows = [(name, str(value)) for name, value in sorted(values.items())]
    field = '<input type="search" placeholder="Filter" aria-label="Filter">' if len(rows) > 20 else ""
    return field + table(("setting", "value"), rows, "settings")


def duration(seconds: float) -> str:
    """45 s, 12 min 5 s, 3 h 20 min."""
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def moment(seconds: float) -> str:
    """Unix seconds as 2026-01-31 23:59 UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
