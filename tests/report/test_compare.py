import json

import pytest

from sdft_ds import compare
from tests.helpers import run_folders
from tests.helpers.html_tree import parse


def page_of(tmp_path, *folders):
    return parse(compare.write(folders, tmp_path / "compare.html").read_text(encoding="utf-8"))


def section(page, anchor):
    return page.one("section", id=anchor)


def figure(page, title):
    (found,) = (f for f in page.all("figure") if f.one("figcaption").text.startswith(title + " "))
    return found


@pytest.fixture
def two(tmp_path):
    return run_folders.make(tmp_path / "sdft", 40), run_folders.make(tmp_path / "sft", 30, "sft", speed=3.0)


def test_before_and_after_stand_side_by_side(tmp_path, two):
    accuracy, distance = section(page_of(tmp_path, *two), "before-and-after").all("table")
    assert accuracy.rows() == [
        ["", "sdft", "sft"],
        ["task", "rows", "before", "after", "change", "before", "after", "change"],
        ["new facts", "200", "0.020", "0.970", "+0.950", "0.020", "0.970", "+0.950"],
        ["old facts", "400", "0.940", "0.910", "-0.030", "0.940", "0.620", "-0.320"],
    ]
    spans = [cell.attributes["colspan"] for cell in accuracy.all("th", scope="colgroup")]
    assert spans == ["2", "3", "3"] and len(distance.rows()) == 4


def test_curves_lie_over_each_other(tmp_path, two):
    page = page_of(tmp_path, *two)
    legend = [(li.text, li.attributes["class"]) for li in figure(page, "Loss").all("li")]
    assert legend == [("sdft", "c0"), ("sft", "c1")]
    shown = json.loads(figure(page, "Loss").one("svg").attributes["data-hover"])["series"]
    assert [len(s["x"]) for s in shown] == [40, 30]
    assert figure(page, "Divergence by position: tokens 0–3")  # a chart of several curves becomes one for each
    heads = [li.text for li in page.one("header").all("li")]
    assert heads[0].startswith("sdft SDFT · org/a-model · teacher ema") and heads[1].startswith(
        "sft SFT · org/a-model"
    )


def test_where_time_went_is_shown_for_both(tmp_path, two):
    bars = figure(page_of(tmp_path, *two), "Time of the whole run")
    names = [t.text for t in bars.all("text", class_="name")]
    assert names[0].startswith("sdft: 10") and names[1].startswith("sft: 8")  # 2.67 s a step, 40 and 30 steps
    assert len(bars.all("rect")) == 8


def test_only_what_differs_of_the_configuration_is_shown(tmp_path, two):
    page = page_of(tmp_path, *two)
    changed = section(page, "configuration")
    rows = changed.one("table").rows()
    assert rows[0] == ["setting", "sdft", "sft"] and ["method_note", "sdft", "sft"] in rows
    assert [row[0] for row in rows[1:]] == ["method_note", "output_dir"]
    assert changed.one("p").text == "2 differ, 5 are the same."
    assert section(page, "environment").one("p").text == "0 differ, 6 are the same."
    assert section(page, "environment").all("table") == []


def test_what_one_run_did_not_log_is_said(tmp_path, two):
    run_folders.write_log(two[1], [{"step": 1, "loss": 1.0, "seconds/student": 1.0, "only/here": 1.0}])
    page = page_of(tmp_path, *two)
    assert [li.text for li in figure(page, "Entropy: teacher").all("li")] == ["sdft", "sft: not logged"]
    assert [li.text for li in figure(page, "only/here").all("li")] == ["sdft: not logged", "sft"]


def test_a_task_that_only_one_run_was_asked_has_its_chart(tmp_path, two):
    for folder, task in zip(two, ("old", "new"), strict=True):
        run_folders.write_log(folder, [{"step": 1, f"tasks/{task}/accuracy": 0.5}])
    page = page_of(tmp_path, *two)
    assert [li.text for li in figure(page, "accuracy: old").all("li")] == ["sdft", "sft: not logged"]
    assert [li.text for li in figure(page, "accuracy: new").all("li")] == ["sdft: not logged", "sft"]


def test_runs_of_the_same_name_are_told_apart_by_their_path(tmp_path):
    folders = [run_folders.make(tmp_path / parent / "run", 5) for parent in ("a", "b")]
    assert page_of(tmp_path, *folders).one("h1").text == " / ".join(map(str, folders))


def test_text_is_escaped(tmp_path):
    folders = [run_folders.make(tmp_path / name, 5) for name in ("<img>", "b")]
    (folders[0] / "run.json").write_text(json.dumps({"model": "<i>", "config": {"</table>": "<img>"}}))
    page = page_of(tmp_path, *folders)
    assert page.all("img") == [] and page.all("i") == []
    assert ["</table>", "<img>", "–"] in section(page, "configuration").one("table").rows()


def test_the_command(tmp_path, two, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare", *map(str, two)])
    compare.main()
    assert capsys.readouterr().out == "Wrote compare.html\n" and (tmp_path / "compare.html").exists()
    for folders, message in (
        ([two[0]], "two to 6 run folders"),
        ([two[0], "gone"], "gone is not the folder of a run"),
    ):
        monkeypatch.setattr("sys.argv", ["compare", *map(str, folders)])
        with pytest.raises(SystemExit, match=f"^sdft_ds: .*{message}"):
            compare.main()
