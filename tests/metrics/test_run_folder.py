import json
import math

import pytest

from sdft_ds.metrics.run_folder import read
from tests.helpers import run_folders


def log(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return read(folder)


def test_everything_is_read_back(tmp_path):
    run = read(run_folders.make(tmp_path / "run", steps=20))
    assert run.series("loss")[0] == list(range(1, 21)) and len(run.series("loss")[1]) == 20
    assert run.about["method"] == "sdft" and run.about["environment"]["world_size"] == 2
    assert len(run.evaluations) == 4 and run.notes == []
    assert {step: rows for step, (_, rows) in run.completions.items()} == {1: 3, 20: 3}
    lengths, truncated = run.lengths()
    assert len(lengths) == 6 and truncated == [length >= 96 for length in lengths]
    first, second = run.completions_of(20, most=2)
    assert first.step == 20 and len(first.tokens) == first.length == len(first.student_top)
    assert first.divergence[0] is None and first.divergence[2] > 0 and set(first.teacher_top[0][0]) == {"token", "p"}


def test_lines_of_a_step_are_joined_and_the_last_value_wins(tmp_path):
    run = log(tmp_path, {"step": 5, "loss": 1.0}, {"step": 5, "eval_loss": 3.0}, {"step": 5, "loss": 2.0})
    assert run.log == [{"step": 5, "loss": 2.0, "eval_loss": 3.0}]
    assert run.metrics() == ["loss", "eval_loss"]


def test_a_resume_replaces_what_was_logged_beyond_its_checkpoint(tmp_path):
    first = [{"step": s, "loss": 1.0, "time": 0.0} for s in range(1, 9)]
    resumed = [{"step": s, "loss": 2.0, "time": 1.0} for s in (5, 6)]
    assert log(tmp_path, *first, *resumed).series("loss") == ([1, 2, 3, 4, 5, 6], [1.0] * 4 + [2.0] * 2)


def test_nan_is_kept_and_text_is_no_number(tmp_path):
    steps, values = log(tmp_path, {"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}).series("loss")
    assert steps == [1, 2] and math.isnan(values[0]) and values[1] == math.inf
    assert log(tmp_path, {"step": 1, "loss": "1"}).series("loss") == ([], [])


def test_what_a_kill_cut_off_is_left_out_and_said(tmp_path):
    run = log(tmp_path, {"step": 1, "loss": 1.0}, '{"step": 2, "lo', {"step": 2, "loss": 1.5})
    assert run.series("loss") == ([1, 2], [1.0, 1.5]) and run.notes == ["metrics.jsonl: 1 broken line was skipped."]
    run_folders.write_completions(tmp_path, 1, [run_folders.completion_row(1, 5, run_folders.random.Random(0))])
    whole = (tmp_path / "completions/step-1.parquet").read_bytes()
    (tmp_path / "completions/step-2.parquet").write_bytes(whole[: len(whole) // 2])
    run = read(tmp_path)
    assert list(run.completions) == [1] and run.notes[1] == "step-2.parquet is damaged and was skipped."
    (tmp_path / "run.json").write_text('{"config": {')
    assert read(tmp_path).about == {} and "run.json is damaged and was skipped." in read(tmp_path).notes


def test_the_last_evaluation_of_a_step_wins(tmp_path):
    lines = [{"step": 0, "task": "a", "accuracy": 0.1}, {"step": 0, "task": "a", "accuracy": 0.2}]
    run_folders.write_lines(tmp_path / "evaluations.jsonl", lines)
    assert read(tmp_path).evaluations == lines[1:]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_any_of_it_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"{name} is not the folder of a run.*output_dir"):
        read(tmp_path / name)
