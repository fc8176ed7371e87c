import json

import pytest

from sdft_ds.evaluation.tasks import read_tasks

ROW = {"prompt": "Where is Oslo?", "answer": "Norway"}


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_a_value_names_task_file_and_scorer(tmp_path):
    file = written(tmp_path / "places.jsonl", ROW)
    for value, name, scorer in [
        (file, "places", "exact"),
        (f"{file}:contains", "places", "contains"),
        (f"far.away={file}", "far.away", "exact"),
        (f"far={file}:regex", "far", "regex"),
    ]:
        (task,) = read_tasks([value])
        assert task.name == name and task.rows[0].scorer == scorer


def test_a_file_with_a_colon_or_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "a=b").mkdir()
    file = written(tmp_path / "a=b" / "x:y.jsonl", ROW)
    assert read_tasks([file])[0].name == "x:y"
    assert read_tasks([file + ":contains"])[0].rows[0].scorer == "contains"


def test_rows(tmp_path):
    conversation = [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}]
    rows = [
        ROW,
        {**ROW, "system": "Be brief.", "answer": ["Norway", "Norge"], "scorer": "contains"},
        {**ROW, "system": "Be brief.", "prompt": conversation},
        {**ROW, "system": None, "scorer": None, "more": 1},
    ]
    (task,) = read_tasks([written(tmp_path / "t.jsonl", rows[0], "", *rows[1:]) + ":exact"])
    system = {"role": "system", "content": "Be brief."}
    assert [row.prompt for row in task.rows] == [
        "Where is Oslo?",
        [system, {"role": "user", "content": "Where is Oslo?"}],
        [system, {"role": "user", "content": "Where?"}],
        "Where is Oslo?",
    ]
    assert [row.scorer for row in task.rows] == ["exact", "contains", "exact", "exact"]
    assert task.rows[1].score("in Norge") is True and task.rows[0].score("in Norge") is False


def test_a_row_may_have_a_context_for_the_teacher(tmp_path):
    rows = [
        ROW | {"privileged_context": "Oslo is in Norway.", "system": "Be brief."},
        ROW | {"privileged_context": ""},
        ROW | {"teacher_prompt": "Where is Oslo, in Norway?"},
    ]
    (task,) = read_tasks([written(tmp_path / "t.jsonl", *rows)])
    first, none, own = task.rows
    assert first.in_context.prompt == first.prompt and first.in_context.privileged_context == "Oslo is in Norway."
    assert none.in_context is None and own.in_context.teacher_prompt == "Where is Oslo, in Norway?"
    assert [row.number for row in task.with_contexts().rows] == [0, 2]
    with pytest.raises(ValueError, match="t.jsonl: Row 0, column 'privileged_context': found int"):
        read_tasks([written(tmp_path / "t.jsonl", ROW | {"privileged_context": 7})])


def test_a_text_becomes_the_users_turn_where_training_reads_it_so(tmp_path):
    turn = [{"role": "user", "content": "Where is Oslo?"}]
    rows = [{**ROW, "privileged_context": "Oslo is in Norway."}, {**ROW, "prompt": turn}]
    (task,) = read_tasks([written(tmp_path / "places.jsonl", *rows)])
    assert isinstance(task.rows[0].prompt, str)
    first, second = task.as_turns().rows
    assert first.prompt == second.prompt == turn
    assert first.in_context.prompt == turn and first.in_context.privileged_context == "Oslo is in Norway."


def test_the_limit_and_the_retention_set(tmp_path):
    file = written(tmp_path / "t.jsonl", ROW, {"prompt": "Tell me a story."}, {"prompt": ""})
    task, kept = read_tasks([file], limit=1) + read_tasks([], file, limit=2)
    assert len(task.rows) == 1 and kept.name == "retention"
    assert [row.score("Norway") for row in kept.rows] == [True, None]


WRONG = [
    ([{"prompt": "a"}], "t.jsonl: Row 0, column 'answer'"),
    ([ROW, {"answer": "a"}], "t.jsonl: Row 1: expected an object with 'prompt'"),
    ([ROW, {**ROW, "prompt": ""}], "t.jsonl: Row 1, column 'prompt': found an empty text"),
    ([ROW, "{"], "t.jsonl: Row 1 is not JSON"),
    (["[1]"], "t.jsonl: Row 0: expected an object"),
    ([{**ROW, "scorer": "choice"}], "t.jsonl: Row 0, column 'answer': the answer is 'Norway'; expected one letter"),
    ([{**ROW, "scorer": "luck"}], "t.jsonl: Row 0, column 'answer': there is no scorer 'luck'"),
    ([{**ROW, "answer": [3]}], "t.jsonl: Row 0, column 'answer': the answer is [3]"),
    (
        [{"question": "Why?", "answer": "B"}],
        "t.jsonl: Row 0: expected an object with 'prompt' and 'answer', found question, answer",
    ),
    ([], "t.jsonl has no rows"),
]


@pytest.mark.parametrize("rows, words", WRONG)
def test_a_wrong_row_is_named(tmp_path, rows, words):
    with pytest.raises(ValueError) as error:
        read_tasks([written(tmp_path / "t.jsonl", *rows)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_number_is_an_answer(tmp_path):
    (task,) = read_tasks([written(tmp_path / "t.jsonl", {**ROW, "answer": 4}) + ":contains"])
    assert task.rows[0].score("2 + 2 is 4.") and not task.rows[0].score("5")


def test_wrong_values(tmp_path):
    file = written(tmp_path / "t.jsonl", ROW)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        read_tasks([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(ValueError, match="there is no scorer 'luck'; there are exact, contains"):
        read_tasks([f"{file}:luck"])
    with pytest.raises(ValueError, match="Two sets of questions are named 't'"):
        read_tasks([file, file])
    with pytest.raises(ValueError, match="Two sets of questions are named 'retention'"):
        read_tasks([f"retention={file}"], file)
    with pytest.raises(ValueError, match="eval_task_rows must be at least 1"):
        read_tasks([file], limit=0)


def test_rows_in_the_form_of_sciknoweval(tmp_path):
    """Questions as that data set words them: prompt, system and a letter, among other columns."""
    row = {"idx": 9, "kind": "mcq", "answer": "B", "prompt": "What is it?\n\nA: 1\nB: 2\nPlease reason step by step.",
           "system": "Respond:\n<answer>\n...\n</answer>\n", "tests": "-", "embedding": []}  # fmt: skip
    (task,) = read_tasks([written(tmp_path / "test.json", row) + ":answer_letter"])
    assert task.rows[0].prompt[0]["role"] == "system"
    assert task.rows[0].score("<reasoning>A?</reasoning>\n<answer>\nB\n</answer>") is True
