"""A saved model is asked what it was asked in training, and says the same."""

import importlib.util
import json

import pytest

from sdft_ds import evaluate, train
from tests.helpers import tiny

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
MEASURED = ("rows", "accuracy", "mean_length", "clipped_share")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of the starting model, folder of the run, flags that name the questions)."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    tiny.llama().save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    asked = [{"prompt": f"Question {i}", "system": "Be brief.", "answer": "[a-m]"} for i in range(5)]
    (folder / "asked.json").write_text("\n".join(map(json.dumps, asked)))
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Say {i}.", "privileged_context": f"It is {i}."}) for i in range(6))
    )
    questions = ["--eval_tasks", f"five={folder}/asked.json:regex", "--retention_file", f"{folder}/asked.json:regex",
                 "--max_completion_length", "8", "--chat_template_kwargs", '{"mood": "Kindly."}']  # fmt: skip
    train.main(
        ["--model_name_or_path", f"{folder}/start", "--dataset_path", f"{folder}/train.jsonl", *questions,
         "--output_dir", f"{folder}/saved", "--max_steps", "3", "--bf16", "false", "--num_generations", "2",
         "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--eval_tasks_steps", "2",
         "--report_to", "none"]
    )  # fmt: skip
    return folder / "start", folder / "saved", questions


def printed(capsys, *argv):
    evaluate.main([str(each) for each in argv] + ["--json"])
    return json.loads(capsys.readouterr().out)


def test_the_figures_of_training(run, capsys):
    start, saved, questions = run
    lines = [json.loads(text) for text in (saved / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 3, 3]
    for flags in ([], ["--start", start]):  # compared with what the run left, and with the model itself
        found = printed(capsys, saved, *questions, *flags)
        assert list(found) == (["start", "model"] if flags else ["model"])
        for name, wanted in (("model", lines[4:]), ("start", lines[:2])):
            for line, logged in zip(found.get(name, wanted), wanted, strict=True):
                assert [line[each] for each in MEASURED] == [logged[each] for each in MEASURED]
                assert line.get("kl_to_start", 0) == pytest.approx(logged.get("kl_to_start", 0), rel=1e-3)
    assert lines[5]["kl_to_start"] > 0


def test_the_table(run, capsys):
    start, saved, questions = run
    evaluate.main([str(saved), *questions, "--start", str(start), "--eval_task_rows", "2"])
    shown = capsys.readouterr().out
    assert all(words in shown for words in ("five: accuracy", "retention: KL, nats/token", "start", "model"))


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "Nothing to evaluate"),
        (["--eval_tasks", "nowhere.json"], "nowhere.json does not exist"),
        pytest.param(
            ["--lm_eval", "hellaswag"],
            "pip install lm_eval",
            marks=pytest.mark.skipif(HAS_LM_EVAL, reason="lm_eval is installed"),
        ),
    ],
)
def test_a_mistake_is_one_line(run, flags, words):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(run[1]), *flags])
    assert words in exit.value.code and "\n" not in exit.value.code


@pytest.mark.parametrize(
    "name, words",
    [
        ("/nowhere/model", "The model /nowhere/model: there is no such folder."),
        ("runs/nowhere", "The model runs/nowhere: there is no such folder, and from the hub: "),
    ],
)
def test_a_model_that_is_not_there_is_named(run, name, words):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([name, *run[2]])
    assert words in exit.value.code
    with pytest.raises(SystemExit) as exit:
        train.main(["--model", name, "--dataset", str(run[0].parent / "train.jsonl"), "--bf16", "false"])
    assert words in exit.value.code and "Repo id" not in exit.value.code


def test_a_start_is_needed(run):
    start, _, questions = run
    with pytest.raises(SystemExit, match="--start STARTING_MODEL"):
        evaluate.main([str(start), *questions])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--eval_tasks_steps", "2"], "--eval_tasks_steps and --eval_task_rows need --eval_tasks"),
        (["--eval_tasks", "nowhere.json"], "nowhere.json does not exist"),
        (
            ["--metric_for_best_model", "eval_tasks/a/accuracy"],
            "no such metric; no tasks are evaluated: set eval_tasks",
        ),
    ],
)
def test_a_mistake_in_training_is_one_line(run, flags, words):
    start, _, _ = run
    data = ["--dataset_path", str(start.parent / "train.jsonl"), "--bf16", "false", "--output_dir", str(start.parent)]
    with pytest.raises(SystemExit) as exit:
        train.main(["--model_name_or_path", str(start), *data, *flags])
    assert words in exit.value.code and "\n" not in exit.value.code


@pytest.mark.full
@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm_eval: pip install lm_eval")
def test_a_task_of_lm_eval_on_a_local_file(run, capsys, tmp_path):
    rows = [{"question": f"Question {i}", "choices": ["yes", "no"], "right": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "yes_or_no", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "doc_to_text": "{{question}}",
            "doc_to_choice": "choices", "doc_to_target": "right",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}  # fmt: skip
    (tmp_path / "yes_or_no.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = printed(capsys, run[1], "--lm_eval", tmp_path / "yes_or_no.yaml")
    assert 0.0 <= found["lm_eval"]["yes_or_no"]["acc,none"] <= 1.0
