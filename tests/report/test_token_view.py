import json
import random

import pytest

from sdft_ds.metrics.run_folder import read
from sdft_ds.report.token_view import completions, level
from tests.helpers import run_folders
from tests.helpers.html_tree import parse

ROW = {
    "step": 3, "prompt": "Who?", "teacher_prompt": "Who?\n\nAnn.", "completion": "Ann\n.", "length": 3,
    "truncated": True, "divergence_mean": 0.51, "tokens": ["Ann", "\n", "."], "divergence": [1.0, 0.02, None],
    "student_top": [[{"token": "Ann", "p": 0.6}, {"token": "Bob", "p": 0.4}]] * 3,
    "teacher_top": [[{"token": "Ann", "p": 0.99996}, {"token": "</script>", "p": 0.00004}]] * 3,
}  # fmt: skip


def view(folder, *rows_of_steps):
    for step, rows in rows_of_steps:
        run_folders.write_completions(folder, step, rows)
    return parse(completions(read(folder)))


@pytest.mark.parametrize(
    "divergence, expected",
    [(None, "dx"), (0.0, "d0"), (0.00999, "d0"), (0.01, "d1"), (0.5, "d4"), (3.0, "d6"), (float("nan"), "d6")],
)
def test_a_token_is_coloured_by_its_divergence(divergence, expected):
    assert level(divergence) == expected


def test_a_completion_shows_prompts_tokens_and_both_distributions(tmp_path):
    page = view(tmp_path, (3, [ROW]))
    tokens = page.one("p", class_="tokens").all("i")
    assert [(t.text, t.attributes["class"]) for t in tokens] == [("Ann", "d5"), ("⏎\n", "d1"), (".", "dx")]
    assert [t.attributes["tabindex"] for t in tokens] == ["0", "-1", "-1"]  # one stop of the tab key
    assert [pre.text for pre in page.all("pre")] == ["Who?", "Who?\n\nAnn."]
    assert [s.text for s in page.all("span", class_="figure")] == ["step 3", "3 tokens, cut off", "0.51 nats/token"]
    shown = json.loads(page.one("script").text)
    assert shown["words"] == ["Ann", "Bob", "</script>", "\n", "."]
    assert shown["tokens"] == [
        [1.0, 0, [0, 6000, 1, 4000], [0, 10000, 2, 0]],
        [0.02, 3, [0, 6000, 1, 4000], [0, 10000, 2, 0]],
        [None, 4, [0, 6000, 1, 4000], [0, 10000, 2, 0]],
    ]


def test_a_divergence_that_is_not_finite_is_still_json(tmp_path):
    page = view(tmp_path, (3, [ROW | {"divergence": [float("nan"), float("inf"), 0.0], "divergence_mean": None}]))
    text = page.one("script").text
    assert [token[0] for token in json.loads(text)["tokens"]] == ["nan", "inf", 0.0] and "NaN" not in text


def test_the_newest_step_stands_first_and_open(tmp_path):
    page = view(tmp_path, (3, [ROW]), (12, [ROW | {"step": 12}]))
    first, second = page.all("details")
    assert first.text.startswith("step 12") and "open" in first.attributes and "open" not in second.attributes
    assert "2 of 2 logged completions, of 2 of 2 steps" in page.one("p", class_="note").text


def test_a_large_run_is_cut_and_says_so(tmp_path):
    noise = random.Random(0)
    row = run_folders.completion_row(1, 1200, noise)
    page = view(tmp_path, *((step, [row | {"step": step}] * 7) for step in range(1, 11)))
    assert len(page.all("details")) == 8 * 5
    steps = dict.fromkeys(d.one("summary").all("span")[0].text for d in page.all("details"))
    assert len(steps) == 8 and list(steps)[0] == "step 10" and list(steps)[-1] == "step 1"
    first_note, *notes = (p.text for p in page.all("p", class_="note"))
    assert first_note.startswith("40 of 70 logged completions, of 8 of 10 steps.")
    assert notes == ["The first 1000 of 1200 tokens."] * 40
    assert len(page.all("p", class_="tokens")[0].all("i")) == 1000


def test_without_completions_it_says_what_to_set(tmp_path):
    run_folders.write_log(tmp_path, [{"step": 1, "loss": 1.0}])
    assert parse(completions(read(tmp_path))).text == "No completions were logged: set log_completions."
