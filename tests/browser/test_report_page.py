"""The pages in a real browser: nothing to complain about, nothing asked of the network, and what the pointer shows."""

import json
import re
import struct
import zlib

import pytest

from sdft_ds import compare, report
from tests.browser.chromium import BINARY, Chromium
from tests.helpers import run_folders

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(BINARY is None, reason="no Chromium: install Debian's package chromium"),
]
EVIL = "</script><img src=x onerror='document.title=1'>"


@pytest.fixture(scope="module")
def browser():
    made = Chromium()
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    noise = run_folders.random.Random(0)
    rows = [run_folders.completion_row(200, 40, noise), run_folders.completion_row(200, 1, noise, tokens=[EVIL])]
    return report.write(run_folders.make(folder / "run", 200, rows=rows))


def colours(png: bytes) -> set[bytes]:
    """The distinct pixels of an 8-bit RGB or RGBA PNG, filters left aside: a blank picture has very few."""
    width, _, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert depth == 8 and kind in (2, 6)
    chunks, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        chunks += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    raw, pixel = zlib.decompress(chunks), 3 if kind == 2 else 4
    lines = [raw[i + 1 : i + 1 + width * pixel] for i in range(0, len(raw), width * pixel + 1)]
    return {line[i : i + pixel] for line in lines for i in range(0, len(line), pixel)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_without_complaint_and_fits(browser, page, tmp_path, width, scheme):
    browser.open(page, width, scheme)
    assert len(colours(browser.screenshot(tmp_path / "page.png"))) > 200
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    red, *_ = map(int, re.findall(r"\d+", browser.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert (red > 200) == (scheme == "light")
    assert browser.evaluate("document.title") == "run"  # no text of the run has run
    assert browser.problems == []


def test_the_pointer_over_a_chart_shows_its_values(browser, page):
    browser.open(page, 1280, "light")
    browser.point_at("#student-and-teacher figure svg")
    tip = browser.evaluate("document.getElementById('tip').innerText")
    assert re.match(r"step \d+\s+student\s+\d\.\d+\s+teacher\s+\d\.\d+", tip), tip
    assert browser.evaluate("document.querySelectorAll('.hair circle').length") == 2
    browser.point_at("h1")
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.evaluate("document.querySelectorAll('.hair circle').length") == 0
    assert browser.problems == []


def test_the_keyboard_moves_the_crosshair(browser, page):
    browser.open(page, 1280, "light")
    browser.press("Tab")  # a focus by keyboard is one that shows
    browser.evaluate("document.querySelector('#optimization svg').focus()")
    assert browser.evaluate("document.querySelector('#tip p').textContent") == "step 200"
    browser.press("ArrowLeft")
    assert browser.evaluate("document.querySelector('#tip p').textContent") == "step 199"


def test_pointer_and_keyboard_show_both_distributions_of_a_token(browser, page):
    browser.open(page, 1280, "light")
    browser.point_at(".tokens i:nth-child(5)")
    head = browser.evaluate("document.querySelector('#tip p').textContent")
    assert re.fullmatch(r"5: .+ · [\d.]+ nats", head), head
    rows = browser.evaluate(
        "[...document.querySelectorAll('#tip tr')].slice(1).map(r => [...r.cells].map(c => c.textContent))"
    )
    assert 5 <= len(rows) <= 10
    for side in (2, 4):
        shares = [float(row[side].split()[0].lstrip("<")) for row in rows if row[side] != "–"]
        assert len(shares) == 5 and 90 < sum(shares) <= 100.5
    widths = "[...document.querySelectorAll('#tip .c1 .fill')].map(e => e.getBoundingClientRect().width)"
    first, *rest = browser.evaluate(widths)
    assert first > max(rest) > 0  # the bars are as long as their shares
    browser.evaluate("document.querySelector('.tokens i').focus()")
    assert "not in the loss" in browser.evaluate("document.querySelector('#tip p').textContent")
    for _ in range(4):
        browser.press("ArrowRight")
    assert browser.evaluate("document.querySelector('#tip p').textContent") == head
    browser.press("Escape")
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.problems == []


def test_text_that_looks_like_html_stays_text(browser, page):
    browser.open(page, 1280, "light")
    browser.evaluate("document.querySelectorAll('details')[1].open = true")
    browser.point_at("details:nth-of-type(2) .tokens i")
    assert EVIL in browser.evaluate("document.querySelector('#tip p').textContent").replace("␣", " ")
    assert browser.evaluate("document.images.length") == 0 and browser.problems == []


def test_settings_are_filtered(browser, tmp_path):
    run_folders.make(tmp_path, 5)
    (tmp_path / "run.json").write_text(json.dumps({"config": {f"setting_{i}": i for i in range(30)}}))
    browser.open(report.write(tmp_path), 1280, "light")
    field = "document.querySelector('input')"
    browser.evaluate(f"{field}.value = 'SETTING_7'; {field}.dispatchEvent(new Event('input'))")
    shown = "[...document.querySelectorAll('#configuration tbody tr:not([hidden])')].map(r => r.innerText)"
    assert [row.split() for row in browser.evaluate(shown)] == [["setting_7", "7"]]


def test_a_comparison_opens_without_complaint(browser, tmp_path):
    runs = [run_folders.make(tmp_path / "a", 200), run_folders.make(tmp_path / "b", 150, "sft", speed=3.0)]
    written = compare.write(runs, tmp_path / "compare.html")
    for width in (1280, 400):
        browser.open(written, width, "light")
        assert len(colours(browser.screenshot(tmp_path / "page.png"))) > 200
        assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.point_at("#optimization svg")
    assert re.match(
        r"step \d+\s+a\s+[\d.]+\s+b\s+[\d.]+", browser.evaluate("document.getElementById('tip').innerText")
    )
    assert browser.problems == []


def test_it_would_have_noticed(browser, tmp_path):
    """The checks above are of use only if a script that the policy forbids, and a picture from elsewhere, are seen."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "bad.html").write_text(f"<html><head>{policy}</head><script>1</script><img src='http://localhost/x'>")
    browser.open(tmp_path / "bad.html", 400, "light")
    assert len(browser.problems) >= 2 and "Content Security Policy" in " ".join(browser.problems)
