"""Charts: pure functions from numbers to an HTML/SVG figure as text; page.css has the colours, page.js the hovering.

Title, unit and legend are HTML text, so that they wrap on a narrow screen; the SVG scales with the figure. The hover
values are in the SVG's data-hover attribute, as JSON.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from sdft_ds.report.scales import Axis, as_json_number, averages, number, step_axis, step_of, thin, tick, value_axis

WIDTH, HEIGHT = 460, 224  # units of the SVG, about a pixel each
LEFT, RIGHT, TOP, BOTTOM = 50, 450, 10, 202  # edges of the plot area
COLUMNS = RIGHT - LEFT  # thinning keeps a curve's extremes in each pixel column
COLOURS = 6  # in page.css: c0 to c5
SMOOTH_FROM = 80  # points; from here on a moving average is drawn over the faint curve


@dataclass(frozen=True)
class Series:
    """A curve: y over x (ascending). colour: its class in page.css (c0 ...; o0..o4 are ordered)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "c0"


def lines(title: str, unit: str, series: Sequence[Series], may_log: bool = True) -> str:
    """Line chart over the step. With may_log, the y axis is logarithmic if all values are positive and span a factor
    of 30. A non-finite value is a gap and a cross at the top. A series without points is in the legend only."""
    legend, series = series, [s for s in series if len(s.x)]
    y_axis = value_axis([y for s in series for y in s.y], BOTTOM, TOP, may_log)
    x_axis = step_axis([x for s in series for x in (s.x[0], s.x[-1])], LEFT, RIGHT)
    body = [_grid(x_axis, y_axis)]
    hover = []
    for s in series:
        x, y = thin(s.x, s.y, COLUMNS)
        smooth = len(s.x) >= SMOOTH_FROM
        body.append(_curve(x, y, x_axis, y_axis, f"curve {s.colour}{' faint' if smooth else ''}"))
        if smooth:
            body.append(_curve(*thin(s.x, averages(s.y), COLUMNS), x_axis, y_axis, f"curve {s.colour}"))
        body += [
            f'<path class="cross {s.colour}" d="M{x_axis(at) - 3:g} {TOP}l6 6m0 -6l-6 6"/>'
            for at, value in zip(x, y, strict=True)
            if not math.isfinite(value)
        ]
        hover.append({"name": s.name, "colour": s.colour, "x": x, "y": [as_json_number(value) for value in y]})
    notes = ["log scale"] if y_axis.log else []
    if bad := sum(not math.isfinite(y) for s in series for y in s.y):
        notes.append(f"✕ {bad} not finite")
    return _figure(title, unit, notes, legend, "".join(body), _hover(x_axis, y_axis, hover, stacked=False))


def stack(title: str, unit: str, x: Sequence[float], series: Sequence[Series]) -> str:
    """Stacked area chart, first series at the bottom; every series has a value >= 0 for each x.

    With more points than pixel columns, a column shows their mean.
    """
    width = math.ceil(len(x) / COLUMNS)
    starts = range(0, len(x), width)
    x = [x[min(i + width, len(x)) - 1] for i in starts]
    means = [[_mean(s.y[i : i + width]) for i in starts] for s in series]
    y_axis = value_axis([0.0, *map(sum, zip(*means, strict=True))], BOTTOM, TOP)
    x_axis = step_axis(x, LEFT, RIGHT)
    pixels = [x_axis(value) for value in x] if len(x) > 1 else [LEFT, RIGHT]  # a single point is drawn at full width

    def edge(heights: list[float]) -> list[str]:
        return [f"{at:g} {y_axis(y):g}" for at, y in zip(pixels, heights * (len(pixels) // len(x)), strict=True)]

    body, hover, under = [], [], [0.0] * len(x)
    for s, values in zip(series, means, strict=True):
        over = [a + b for a, b in zip(under, values, strict=True)]
        body.append(f'<path class="area {s.colour}" d="M{"L".join(edge(over) + edge(under)[::-1])}Z"/>')
        hover.append({"name": s.name, "colour": s.colour, "x": x, "y": [as_json_number(value) for value in values]})
        under = over
    body.insert(0, _grid(x_axis, y_axis))
    return _figure(title, unit, [], series, "".join(body), _hover(x_axis, y_axis, hover, stacked=True))


def histogram(title: str, unit: str, groups: dict[str, Sequence[int]], counted: str = "completions") -> str:
    """Stacked histogram of integers >= 0, in at most 24 bins of equal width.

    counted: what is counted; the unit of the y axis.
    """
    values = [value for group in groups.values() for value in group]
    width = step_of((max(values) - min(values) + 1) / 24, whole=True)
    first = min(values) // width
    counts = [[0] * (max(values) // width - first + 1) for _ in groups]
    for bins, group in zip(counts, groups.values(), strict=True):
        for value in group:
            bins[value // width - first] += 1
    totals = [sum(column) for column in zip(*counts, strict=True)]
    y_axis = value_axis([0, *totals], BOTTOM, TOP, whole=True)
    x_axis = Axis(first * width, (first + len(totals)) * width, LEFT, RIGHT, whole=True)
    body = [_grid(x_axis, y_axis, x_label=unit)]
    for i in range(len(totals)):
        left, right = x_axis((first + i) * width), x_axis((first + i + 1) * width)
        span = f"{(first + i) * width}" + (f"–{(first + i + 1) * width - 1}" if width > 1 else "")
        under = 0
        for at, (name, bins) in enumerate(zip(groups, counts, strict=True)):
            if bins[i]:
                top, bottom = y_axis(under + bins[i]), y_axis(under)
                body.append(
                    f'<rect class="bar c{at}" x="{left + 0.5:g}" y="{top:g}" width="{right - left - 1:g}" '
                    f'height="{bottom - top:g}"><title>{span} {escape(unit)}: {bins[i]} {escape(name)}</title></rect>'
                )
                under += bins[i]
    legend = [Series(name, [], [], f"c{at}") for at, name in enumerate(groups)]
    return _figure(title, counted, [], legend, "".join(body), None)


def shares(title: str, unit: str, rows: dict[str, Sequence[float]], parts: Sequence[str]) -> str:
    """Horizontal stacked bars, one per row, to a common scale."""
    most = max(map(sum, rows.values())) or 1.0
    body = []
    for i, (name, values) in enumerate(rows.items()):
        top, left, whole = 4 + 46 * i, 0.0, sum(values) or 1.0
        total = f"{number(sum(values))} {unit}"
        body.append(f'<text class="name" x="0" y="{top + 12}">{escape(f"{name}: {total}")}</text>')
        for at, (part, value) in enumerate(zip(parts, values, strict=True)):
            width = WIDTH * value / most
            label = f"{100 * value / whole:.0f} %"
            body.append(
                f'<rect class="bar c{at}" x="{left:.1f}" y="{top + 18}" width="{max(0.0, width - 1):.1f}" height="22">'
                f"<title>{escape(part)}: {number(value)} {escape(unit)}, {label}</title></rect>"
            )
            if width > 36:
                body.append(f'<text class="onbar" x="{left + width / 2:.1f}" y="{top + 33}">{label}</text>')
            left += width
    legend = [Series(part, [], [], f"c{at}") for at, part in enumerate(parts)]
    return _figure(title, unit, [], legend, "".join(body), None, height=46 * len(rows) + 4)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str = "step") -> str:
    across = [
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y_axis(y):g}" y2="{y_axis(y):g}"/>'
        f'<text class="y" x="{LEFT - 6}" y="{y_axis(y) + 4:g}">{tick(y)}</text>'
        for y in y_axis.ticks()
    ]
    along = [f'<text class="x" x="{x_axis(x):g}" y="{BOTTOM + 16}">{tick(x)}</text>' for x in x_axis.ticks()]
    label = f'<text class="y" x="{LEFT - 14}" y="{BOTTOM + 16}">{escape(x_label)}</text>'
    base = f'<line class="base" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    return f'<g class="marks">{"".join(across + along)}{label}{base}</g>'


def _curve(x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis, style: str) -> str:
    """Draws the finite runs of a curve; a run of one point is a dot."""
    path, dots = "", ""
    for finite, run in groupby(zip(x, y, strict=True), key=lambda point: math.isfinite(point[1])):
        if finite:
            pixels = [(x_axis(px), y_axis(py)) for px, py in run]
            path += "M" + "L".join(f"{px:g} {py:g}" for px, py in pixels)
            if len(pixels) == 1:
                dots += f'<circle class="{style}" cx="{pixels[0][0]:g}" cy="{pixels[0][1]:g}" r="2"/>'
    return f'<path class="{style}" d="{path}"/>{dots}'


def _hover(x_axis: Axis, y_axis: Axis, series: list[dict], stacked: bool) -> dict:
    axes = {name: [a.low, a.high, a.start, a.end] for name, a in (("x", x_axis), ("y", y_axis))}
    return {"axes": axes, "log": y_axis.log, "stacked": stacked, "series": series}


def _figure(
    title: str,
    unit: str,
    notes: Sequence[str],
    legend: Sequence[Series],
    body: str,
    hover: dict | None,
    height: int = HEIGHT,
) -> str:
    said = ", ".join(part for part in (unit, *notes) if part)
    entries = "".join(f'<li class="{s.colour}">{escape(s.name)}</li>' for s in legend) if len(legend) > 1 else ""
    data = f' tabindex="0" data-hover="{escape(json.dumps(hover, separators=(",", ":")))}"' if hover else ""
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(said)}</small></figcaption>"
        f'<ul class="legend">{entries}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(f"{title}, {said}")}"{data}>{body}</svg>'
        "</figure>"
    )


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; 0 if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else 0.0
