import ast
import base64
import hashlib
import json
import random
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sdft_ds import report
from sdft_ds.metrics.meters import METRICS
from sdft_ds.report import __main__ as command
from sdft_ds.report.curves import CHARTS
from sdft_ds.report.page import duration
from tests.helpers import run_folders
from tests.helpers.html_tree import parse

EVIL = "</script><img src=x onerror=alert(1)>\"'&amp;"


def page_of(folder):
    return parse(report.write(folder).read_text(encoding="utf-8"))


def section(page, anchor):
    return page.one("section", id=anchor)


def test_a_whole_run_shows_everything(tmp_path):
    page = page_of(run_folders.make(tmp_path / "my-run", steps=60))
    assert page.one("h1").text == page.one("head").one("title").text == "my-run"
    assert page.one("p", class_="facts").text == (
        "SDFT · org/a-model · teacher ema · started 2026-09-21 14:13 UTC · took 1 h 5 min"
    )
    anchors = [s.attributes["id"] for s in page.all("section")]
    assert [a.attributes["href"] for a in page.one("nav").all("a")] == [f"#{anchor}" for anchor in anchors]
    titles = [caption.text for caption in page.all("figcaption")]
    for charts in CHARTS.values():
        for chart in charts:
            assert sum(title.startswith(f"{chart.title} {chart.unit}") for title in titles) == 1, chart.title
    assert any(t.startswith("completions/loss_tokens tokens") for t in titles)  # what stands in no chart: Other
    assert sum(t.startswith(("Time of a step", "Lengths of logged completions")) for t in titles) == 2
    assert page.all("p", class_="missing") == []
    assert ["learning_rate", "2e-05"] in section(page, "configuration").one("table").rows()
    assert ["world_size", "2"] in section(page, "environment").one("table").rows()
    assert ["torch", "2.13.0"] in section(page, "environment").one("table").rows()
    assert len(section(page, "completions").all("details")) == 6


def test_the_summary_says_first_and_last_and_where_time_went(tmp_path):
    log = [
        {"step": s, "sdft/distillation_loss": 2.0 / s, "memory/peak_gib": 4.0 + s, "tokens/per_second": 100.0 * s,
         "seconds/rollout": 3.0, "seconds/student": 1.0}
        for s in (1, 2, 4)
    ]  # fmt: skip
    run_folders.write_log(tmp_path / "run", log)
    page = page_of(tmp_path / "run")
    names, figures = ([e.text for e in page.one("dl").all(tag)] for tag in ("dt", "dd"))
    assert dict(zip(names, figures, strict=True)) == {
        "Divergence, first → last, nats/token": "2 → 0.5", "Steps": "4", "Seconds per step": "4",
        "Most time in": "rollout, 75 %", "Tokens per second, median": "200", "Peak memory, GiB": "8",
    }  # fmt: skip
    stacked = section(page, "time").all("figure")[0]
    assert [li.text for li in stacked.all("li")] == ["rollout 75 %", "teacher 0 %", "student 25 %", "optimizer 0 %"]
    shown = json.loads(stacked.one("svg").attributes["data-hover"])["series"]
    assert [s["y"] for s in shown] == [[3.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3]


def test_before_and_after(tmp_path):
    run_folders.write_lines(tmp_path / "evaluations.jsonl", [
        {"step": 0, "task": "old", "rows": 10, "accuracy": 0.9, "kl_to_start": 0.0},
        {"step": 50, "task": "old", "rows": 10, "accuracy": 0.7, "kl_to_start": 0.0002},
        {"step": 100, "task": "old", "rows": 10, "accuracy": 0.8, "kl_to_start": 0.0004},
        {"step": 100, "task": "new", "rows": 5, "accuracy": 1.0},
    ])  # fmt: skip
    accuracy, distance = section(page_of(tmp_path), "before-and-after").all("table")
    assert accuracy.rows() == [
        ["task", "rows", "before", "after", "change"],
        ["old", "10", "0.900", "0.800", "-0.100"],
        ["new", "5", "–", "1.000", "–"],
    ]
    assert distance.rows()[1:] == [["old", "10", "0.000", "0.0004", "+0.0004"]]


def test_tasks_that_are_asked_while_it_trains_have_a_chart_for_each_figure(tmp_path):
    log = [{"step": s, "tasks/old/accuracy": 0.9, "tasks/a/b/accuracy": s / 9, "tasks/old/mean_length": 5.0}
           for s in range(3)]  # fmt: skip
    run_folders.write_log(tmp_path, [*log, {"step": 3, "eval_runtime": 3.0, "eval_new_a_runtime": 2.0,
        "eval_tokens/padding_share": 0.5, "eval_new_a_seconds/rollout": 0.5}])  # fmt: skip
    page = page_of(tmp_path)
    accuracy, length = section(page, "tasks").all("figure")
    assert accuracy.one("figcaption").text.startswith("accuracy by task")
    assert [li.text for li in accuracy.all("li")] == ["old", "a/b"] and length.one("figcaption").text.startswith(
        "mean"
    )
    captions = [caption.text for caption in section(page, "other").all("figcaption")]
    assert captions == ["eval_tokens/padding_share share", "eval_new_a_seconds/rollout s/step"]


def test_the_names_of_metrics_on_pages_and_in_messages_are_those_that_are_logged():
    package = Path(report.__file__).parent
    others = ("compare", "metrics/progress", "model_card", "metrics/nonfinite", "metrics/completions", "train")
    readers = [*package.glob("*.py"), *(package.parent / f"{name}.py" for name in others)]
    groups = {name.partition("/")[0] for name in METRICS}
    named = {
        node.value
        for path in readers
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(rf"({'|'.join(groups)})/\w+", str(node.value))
    }
    drawn = {metric for charts in CHARTS.values() for chart in charts for metric in chart.curves}
    made_up = run_folders.log_line(1, 2, random.Random(0)).keys()
    from_transformers = {"step", "epoch", "time", "loss", "grad_norm", "learning_rate"}
    named -= {metric.unit for metric in METRICS.values()}
    assert len(named) > 20 and named | drawn | made_up <= METRICS.keys() | from_transformers


def test_a_top_k_runs_page_draws_both_sides_mass(tmp_path):
    page = page_of(run_folders.make(tmp_path / "run", steps=5))
    (chart,) = (f for f in page.all("figure") if f.one("figcaption").text.startswith("Probability on the student's"))
    assert [li.text for li in chart.all("li")] == ["student's", "teacher's"]
    assert "Not logged" not in section(page, "student-and-teacher").text


def test_what_is_missing_is_said(tmp_path):
    run_folders.write_log(tmp_path, [{"step": 1, "loss": 1.0, "time": 1.0}])
    page = page_of(tmp_path)
    said = [p.text for p in page.all("p", class_="missing")]
    assert "No completions were logged: set log_completions." in said
    assert "No evaluations were written: evaluations.jsonl is missing or empty." in said
    assert "No config was written: run.json is missing or has none." in said
    assert "Not logged: Gradient norm, Learning rate." in said
    assert any("Teacher drift (a live teacher has none)" in text for text in said)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "run.json").write_text('{"model": "m"}')
    page = page_of(tmp_path)
    assert section(page, "curves").one("p").text == "No metrics were logged: metrics.jsonl is missing or empty."
    assert page.all("svg") == []


def test_a_broken_line_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert "metrics.jsonl: 1 broken line was skipped." in section(page_of(tmp_path), "summary").text


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    (tmp_path / "run.json").write_text('{"method": "sft", "started": 0, "finished": null, '
                                       '"config": {"teacher_model_kind": "ema"}}')  # fmt: skip
    assert page_of(tmp_path).one("p", class_="facts").text == "SFT · started 1970-01-01 00:00 UTC · not finished"
    assert [duration(s) for s in (45.2, 725, 12_000)] == ["45 s", "12 min 5 s", "3 h 20 min"]


def test_no_text_of_a_run_becomes_html(tmp_path):
    folder = tmp_path / "<b>run"
    row = run_folders.completion_row(1, 3, random.Random(0), prompt=EVIL, teacher_prompt=EVIL, completion=EVIL,
                                     tokens=[EVIL] * 3, student_top=[[{"token": EVIL, "p": 0.5}]] * 3)  # fmt: skip
    run_folders.make(folder, steps=5, rows=[row])
    run_folders.write_lines(folder / "evaluations.jsonl", [{"step": 0, "task": EVIL, EVIL: 1.0}])
    run_folders.write_log(folder, [{"step": 1, EVIL: 1.0}])
    (folder / "run.json").write_text(json.dumps({"model": EVIL, "config": {EVIL: EVIL}}))
    page = page_of(folder)
    assert page.all("img") == [] and page.all("b", class_=None) == []
    assert page.one("h1").text == "<b>run" and [EVIL, EVIL] in section(page, "configuration").one("table").rows()
    first = section(page, "completions").all("details")[0]
    assert [pre.text for pre in first.all("pre")] == [EVIL, EVIL]
    assert {i.text for i in first.all("i")} == {EVIL} and EVIL in json.loads(first.one("script").text)["words"]


def test_the_policy_allows_the_page_itself_and_nothing_else(tmp_path):
    page = page_of(run_folders.make(tmp_path, steps=5))
    (meta,) = (m for m in page.all("meta") if m.attributes.get("http-equiv") == "Content-Security-Policy")
    policy = dict(part.strip().split(" ", 1) for part in meta.attributes["content"].split(";"))
    (script,) = (s for s in page.all("script") if s.attributes.get("type") != "application/json")
    for what, element in (("style-src", page.one("style")), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert policy[what] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["img-src"] == "data:"

    def attributes(element):
        yield from element.attributes.items()
        for child in element.children:
            if not isinstance(child, str):
                yield from attributes(child)

    for name, value in attributes(page):  # neither what the policy would block nor what it could not
        assert name != "style" and not name.startswith("on")
        assert name != "src" and (name != "href" or value.startswith(("#", "data:")))
    assert "http" not in script.text.replace("http://www.w3.org/2000/svg", "") and "url(" not in page.one("style").text


def test_a_long_run_makes_a_page_of_a_few_megabytes(tmp_path):
    noise = random.Random(0)
    run_folders.write_log(tmp_path, [run_folders.log_line(step, 10_000, noise) for step in range(1, 10_001)])
    run_folders.write_completions(tmp_path, 5, [run_folders.completion_row(5, 1000, noise)])
    file = tmp_path / "completions/step-5.parquet"
    parquet.write_table(pyarrow.concat_tables([parquet.read_table(file)] * 100), file)
    written = report.write(tmp_path)
    assert written.stat().st_size < 10e6
    assert "40 of 100 logged completions, of 1 of 1 steps." in written.read_text(encoding="utf-8")


def test_the_command(tmp_path, monkeypatch, capsys):
    run_folders.make(tmp_path / "run", steps=5)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    command.main()
    *said, wrote = capsys.readouterr().out.splitlines()
    assert wrote == f"Wrote {tmp_path / 'page.html'}" and (tmp_path / "page.html").exists()
    assert said[0] == "Learned: right answers in new facts 0.02 → 0.97 (200 questions)."
    shown = section(parse((tmp_path / "page.html").read_text(encoding="utf-8")), "verdict")
    assert [item.text for item in shown.all("li")] == [sentence.removeprefix("→ ") for sentence in said]
    assert not (tmp_path / "run/report.html").exists()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"^sdft_ds: .*nowhere is not the folder of a run: [^\n]*$"):
        command.main()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "run"), "--output", str(tmp_path / "no/such/page.html")])
    with pytest.raises(SystemExit, match=r"^sdft_ds: [^\n]*no/such/page.html"):
        command.main()
