import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sdft_ds.sequential import Stage, curves, forgotten, main
from tests.cli.test_train import PLAIN, ROOT, TWO_STEPS, command
from tests.helpers import tiny
from tests.helpers.html_tree import parse

# Stands for launch/train.py: accuracies rise with the calls of its own task and fall with the others'.
TRAIN = """
import json, pathlib, sys
flag = lambda name: sys.argv[len(sys.argv) - sys.argv[::-1].index(name)]
out = pathlib.Path(flag("--output_dir")); out.mkdir(exist_ok=True)
call = [out.name, flag("--model_name_or_path")]
with open(out.parent / "calls.jsonl", "a") as calls: print(json.dumps(call), file=calls)
if (out.parent / "fail").exists() and out.name.startswith("2"): sys.exit(7)
lines = [{"step": s, "task": t, "accuracy": (0.25 if s == 0 else 0.75 if out.name.endswith(t) else 0.5)}
         for s in (0, 5) for t in ("a", "b")]
(out / "evaluations.jsonl").write_text("\\n".join(map(json.dumps, lines)))
"""


def files(folder: Path) -> list[str]:
    """Two stages; the questions of both can be answered by a random model now and then."""
    stages = []
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i}", "privileged_context": f"It is {name}."} for i in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}-test.jsonl").write_text(json.dumps({"prompt": f"{name} 1", "answer": "[a-m]"}))
        stages += ["--stage", f"{name}={folder / name}.jsonl,{folder / name}-test.jsonl:regex"]
    return stages


@pytest.fixture
def sequential(tmp_path):
    """Runs the stages with what pretends to be launch/train.py; what it exits with, None where it does not."""
    (tmp_path / "train.py").write_text(TRAIN)

    def run(*arguments, script=tmp_path / "train.py"):
        try:
            main(script, [str(argument) for argument in arguments])
        except SystemExit as leaving:
            return leaving.code
        return None

    return run


def calls(output: Path) -> list[list[str]]:
    return [json.loads(line) for line in (output / "calls.jsonl").read_text().splitlines()]


def test_stages_follow_each_other_and_the_matrix_says_what_they_did(tmp_path, capfd, sequential):
    output = tmp_path / "out"
    assert sequential(*files(tmp_path), "--output_dir", output, "--", "--model_name_or_path", "m") is None
    assert calls(output) == [["1-a", "m"], ["2-b", str(output / "1-a")]]
    assert json.loads((output / "matrix.json").read_text()) == {
        "tasks": ["a", "b"],
        "after": [{"stage": "start", "a": 0.25, "b": 0.25}, {"stage": "a", "a": 0.75, "b": 0.5},
                  {"stage": "b", "a": 0.5, "b": 0.75}],
        "forgotten": {"a": 0.25},
    }  # fmt: skip
    page = parse((output / "matrix.html").read_text())
    assert page.one("table").rows() == [["", "a", "b"], ["start", "0.250", "0.250"], ["after a", "0.750", "0.500"],
                    ["after b", "0.500", "0.750"], ["forgotten", "0.250", "–"]]  # fmt: skip
    assert len(page.all("svg")) == 1 and "forgotten" in capfd.readouterr().out


def test_what_is_finished_is_not_trained_again(tmp_path, capfd, sequential):
    output = tmp_path / "out"
    arguments = [*files(tmp_path), "--output_dir", output, "--", "--model_name_or_path", "m"]
    output.mkdir()
    (output / "fail").touch()
    assert sequential(*arguments) == 7 and "Stage b has not finished" in capfd.readouterr().err
    assert [row["stage"] for row in json.loads((output / "matrix.json").read_text())["after"]] == ["start", "a"]
    (output / "fail").unlink()
    assert sequential(*arguments) is None
    assert [name for name, _ in calls(output)] == ["1-a", "2-b", "2-b"]
    other = sequential(*arguments, "--seed", "1")
    assert "Stage 1" in other and "another --output_dir" in other


def test_a_preempted_stage_is_not_finished(tmp_path, capfd, sequential):
    output = tmp_path / "out"
    (output / "1-a").mkdir(parents=True)
    (output / "1-a" / "PREEMPTED").touch()
    assert sequential(*files(tmp_path), "--output_dir", output, "--", "--model_name_or_path", "m") == 1
    assert "Stage a has not finished" in capfd.readouterr().err and len(calls(output)) == 1


def test_a_dry_run_prints_the_commands(tmp_path, capfd, sequential):
    options = ["--launcher", "deepspeed --num_gpus 2", "--output_dir", tmp_path / "out", "--dry-run"]
    flags = ["--model_name_or_path", "m", "--bf16", "false"]
    sequential(*files(tmp_path), *options, "--", *flags, script="launch/train.py")
    first, second = (line.split() for line in capfd.readouterr().out.splitlines())
    assert first[:4] == ["deepspeed", "--num_gpus", "2", "launch/train.py"]
    assert first[4:] == [
        "--model_name_or_path", "m", "--bf16", "false", "--dataset_path", f"{tmp_path}/a.jsonl",
        "--output_dir", f"{tmp_path}/out/1-a", "--eval_tasks", f"a={tmp_path}/a-test.jsonl:regex",
        f"b={tmp_path}/b-test.jsonl:regex", "--resume_from_checkpoint", "true",
    ]  # fmt: skip
    assert second[second.index("--output_dir") + 2 :][:2] == ["--model_name_or_path", f"{tmp_path}/out/1-a"]
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_adapters_are_merged_between_stages(tmp_path):
    """Both stages with the real launch/train.py: the second one starts from what the first one learned."""
    tiny.llama().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", "1e-2"]
    flags = ["--model_name_or_path", tmp_path / "model", *TWO_STEPS, *lora]
    command(PLAIN[0], ROOT / "launch/sequential.py", *files(tmp_path), "--output_dir", tmp_path / "out", "--", *flags)
    start, first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()["model.layers.0.mlp.up_proj.weight"]
        for folder in ("model", "out/1-a/merged", "out/2-b/merged")
    )
    assert (first - start).norm() > 0 and (second - first).norm() > 0
    about = json.loads((tmp_path / "out/2-b/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "out/1-a/merged")
    matrix = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert all(row[task] in (0.0, 1.0) for row in matrix["after"] for task in ("a", "b"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stage", "a=x.jsonl"], "expected NAME=TRAIN_FILE,TASK_FILE"),
        (["--stage", "start=README.md,README.md"], "other than retention and start"),
        (["--stage", "a=nowhere.jsonl,README.md"], "nowhere.jsonl does not exist"),
        (["--stage", "a=README.md,nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--stage", "a=README.md,{tasks}", "--stage", "a=README.md,{tasks}"], "are named 'a'"),
        (["--stage", "a=README.md,{tasks}", "--", "--eval_tasks=x"], "--eval_tasks is each stage's own"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, sequential, arguments, words):
    files(tmp_path)
    said = sequential(*(text.format(tasks=tmp_path / "a-test.jsonl") for text in arguments))
    assert said.startswith("sdft_ds: ") and words in said and "\n" not in said


def test_the_data_of_all_stages_are_looked_at_before_the_first_is_trained(tmp_path, sequential):
    stages = files(tmp_path)
    (tmp_path / "b.jsonl").write_text(json.dumps({"x": 1, "y": 2}))
    said = sequential(*stages, "--output_dir", tmp_path / "out", "--", "--model_name_or_path", "m")
    assert said.startswith("sdft_ds: Stage b: ") and "columns x, y" in said
    assert not (tmp_path / "out" / "calls.jsonl").exists()


def test_forgotten_is_the_best_since_a_tasks_own_stage_less_the_last():
    rows = [{"a": 0.9, "b": 0.8, "c": 0.0}, {"a": 0.5, "b": 0.7, "c": 0.0}, {"a": 0.6, "b": 0.4, "c": 0.0}]
    assert forgotten(["a", "b", "c"], rows[:2]) == {}
    assert forgotten(["a", "b", "c"], rows) == {"a": 0.0}
    last = {"a": 0.25, "b": 0.5, "c": 0.9}
    assert forgotten(["a", "b", "c"], [*rows, last]) == pytest.approx({"a": 0.35, "b": -0.0})


def test_curves_run_over_the_steps_of_all_stages():
    run = [{"step": step, "task": "a", "accuracy": step / 10} for step in (0, 4, 8)]
    (series,) = curves(["a"], [run, run[:2]])
    assert (series.x, series.y) == ([0, 4, 8, 12], [0.0, 0.4, 0.8, 0.4])


def test_a_stage_as_it_is_typed(tmp_path):
    (tmp_path / "a").touch()
    assert Stage.parse(f"n-1={tmp_path}/a,q.jsonl:choice") == Stage("n-1", f"{tmp_path}/a", "q.jsonl:choice")
