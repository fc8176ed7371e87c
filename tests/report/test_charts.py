import json
import math
import re

import pytest

from sdft_ds.report.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Series, histogram, lines, shares, stack
from tests.helpers.html_tree import parse


def points(path):
    return [[float(n) for n in pair.split()] for pair in re.findall(r"[-\d.]+ [-\d.]+", path.attributes["d"])]


def curves(figure):
    return [path for path in figure.all("path") if path.attributes["class"].startswith("curve")]


def hover(figure):
    return json.loads(figure.one("svg").attributes["data-hover"])


def test_a_curve_goes_through_its_points_and_the_pointer_shows_them():
    figure = parse(lines("Loss", "nats", [Series("loss", [1, 2, 3], [4.0, 8.0, 6.0])]))
    (curve,) = curves(figure)
    (x0, y0), (x1, y1), (x2, y2) = points(curve)
    assert (x0, x1, x2) == (LEFT, (LEFT + RIGHT) / 2, RIGHT)
    assert y1 < y2 < y0 and all(TOP <= y <= BOTTOM for y in (y0, y1, y2))
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)  # linear
    shown = hover(figure)
    assert shown["series"] == [{"name": "loss", "colour": "c0", "x": [1, 2, 3], "y": [4.0, 8.0, 6.0]}]
    assert figure.one("figcaption").text == "Loss nats" and not shown["log"]
    assert [t.text for t in figure.all("text", class_="x")] == ["1", "2", "3"]
    assert figure.all("li") == []  # one curve needs no legend


def test_values_over_orders_of_magnitude_get_a_logarithmic_axis():
    series = [Series("a", [1, 2, 3], [1.0, 0.1, 0.01])]
    figure = parse(lines("Loss", "nats", series))
    (_, y0), (_, y1), (_, y2) = points(curves(figure)[0])
    assert y2 - y1 == pytest.approx(y1 - y0, abs=0.2)
    assert "log scale" in figure.one("figcaption").text and hover(figure)["log"]
    assert "log scale" not in lines("Loss", "nats", series, may_log=False)


def test_what_is_not_finite_is_a_gap_and_a_cross():
    y = [1.0, 2.0, math.nan, 2.0, 1.0, math.inf]
    figure = parse(lines("Loss", "", [Series("a", range(6), y)]))
    (curve,) = curves(figure)
    assert curve.attributes["d"].count("M") == 2
    crosses = [path for path in figure.all("path") if path.attributes["class"].startswith("cross")]
    assert len(crosses) == 2 and "2 not finite" in figure.one("figcaption").text
    assert hover(figure)["series"][0]["y"] == [1.0, 2.0, "nan", 2.0, 1.0, "inf"]
    assert curves(parse(lines("Loss", "", [Series("a", [1], [math.nan])])))[0].attributes["d"] == ""


def test_a_single_point_is_a_dot():
    dot = parse(lines("Loss", "", [Series("a", [5], [0.5])])).one("circle")
    assert float(dot.attributes["cx"]) == LEFT and TOP < float(dot.attributes["cy"]) < BOTTOM


def test_many_points_are_thinned_and_averaged():
    y = [2.0 + (-1) ** i for i in range(10_000)]
    y[5000] = 50.0
    html = lines("Loss", "", [Series("a", range(10_000), y)])
    faint, average = curves(parse(html))
    assert "faint" in faint.attributes["class"] and len(html) < 120_000
    assert min(py for _, py in points(faint)) < 30 < min(py for _, py in points(average))  # the spike stays
    assert 50.0 in hover(parse(html))["series"][0]["y"]


def test_a_legend_names_each_series_also_one_without_points():
    figure = parse(lines("Loss", "", [Series("a", [1], [1.0]), Series("b: not logged", [], [], "c1")]))
    assert [(li.text, li.attributes["class"]) for li in figure.all("li")] == [("a", "c0"), ("b: not logged", "c1")]
    assert len(hover(figure)["series"]) == 1


def test_text_is_escaped():
    figure = lines("<b>", "&", [Series('"><img>', [1], [1.0]), Series("</svg>", [1], [1.0])])
    assert parse(figure).all("img") == [] and parse(figure).all("b") == []
    assert hover(parse(figure))["series"][1]["name"] == "</svg>"


def test_areas_stand_on_each_other():
    figure = parse(
        stack("Time", "s", [1, 2], [Series("a", [1, 2], [1.0, 3.0]), Series("b", [1, 2], [1.0, 1.0], "c1")])
    )
    lower, upper = (points(path) for path in figure.all("path"))
    assert upper[2:] == lower[:2][::-1]  # the lower edge of b is the upper edge of a
    assert lower[2:] == [[RIGHT, BOTTOM], [LEFT, BOTTOM]]
    assert BOTTOM - upper[1][1] == pytest.approx(4 * (BOTTOM - lower[0][1]), abs=0.5)
    assert hover(figure)["stacked"]


def test_areas_of_many_points_show_means_and_of_one_point_a_block():
    x = range(1, 10_001)
    figure = parse(stack("Time", "s", x, [Series("a", x, [1.0 + i % 2 for i in range(10_000)])]))
    (shown,) = hover(figure)["series"]
    assert len(shown["x"]) == 400 and shown["x"][-1] == 10_000
    assert shown["y"] == pytest.approx([1.5] * 400, abs=0.03)
    (block,) = parse(stack("Time", "s", [3], [Series("a", [3], [2.0])])).all("path")
    assert {px for px, _ in points(block)} == {LEFT, RIGHT}


def test_a_histogram_counts_all():
    groups = {"ended": [1, 1, 2, 100, 55], "cut off": [128, 128]}
    figure = parse(histogram("Length", "tokens", groups))
    titles = [bar.one("title").text for bar in figure.all("rect")]
    assert sum(int(t.split(": ")[1].split()[0]) for t in titles) == 7
    assert "120–129 tokens: 2 cut off" in titles and "0–9 tokens: 3 ended" in titles
    heights = [float(bar.attributes["height"]) for bar in figure.all("rect")]
    assert heights[0] == pytest.approx(3 * heights[1], abs=0.5)
    # values of one size: bins of one token
    assert "5 tokens: 2 ended" in histogram("Length", "tokens", {"ended": [5, 5]})


def test_shares_are_parts_of_the_longest_bar():
    figure = parse(shares("Time", "s", {"a": [30.0, 10.0], "b": [20.0, 0.0]}, ["rollout", "student"]))
    widths = [float(bar.attributes["width"]) for bar in figure.all("rect")]
    assert widths == pytest.approx([0.75 * WIDTH - 1, 0.25 * WIDTH - 1, 0.5 * WIDTH - 1, 0], abs=0.1)
    assert [t.text for t in figure.all("text", class_="name")] == ["a: 40 s", "b: 20 s"]
    assert [t.text for t in figure.all("text", class_="onbar")] == ["75 %", "25 %", "100 %"]
    assert figure.one("svg").attributes["viewbox"] == f"0 0 {WIDTH} 96"
