import json

import pytest
from datasets import Dataset, DatasetDict

from sdft_ds.arguments import ScriptArguments
from sdft_ds.sources import load_splits, map_columns

ROWS = [{"prompt": "Why?", "answer": "Because.", "system": "Be brief."}, {"prompt": "How?", "answer": "So.",
                                                                       "system": "Be kind."}]  # fmt: skip


def write(path, rows=ROWS):
    if path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_file_is_the_training_split(tmp_path, name):
    splits = load_splits(ScriptArguments(dataset_path=str(write(tmp_path / name))))
    assert splits["train"]["prompt"] == ["Why?", "How?"] and list(splits) == ["train"]


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "train-0.jsonl")
    write(tmp_path / "train-1.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    splits = load_splits(ScriptArguments(dataset_path=str(tmp_path)))
    assert len(splits["train"]) == 4 and len(splits["test"]) == 1


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: DatasetDict({"train": Dataset.from_list(rows)})])
def test_a_save_to_disk_folder(tmp_path, make):
    make(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert len(load_splits(ScriptArguments(dataset_path=str(tmp_path / "saved")))["train"]) == 2


def test_errors_name_the_path_and_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json does not exist"):
        load_splits(ScriptArguments(dataset_path=str(tmp_path / "missing.json")))
    with pytest.raises(ValueError, match=r"holds no \.json"):
        load_splits(ScriptArguments(dataset_path=str(tmp_path)))
    with pytest.raises(ValueError, match="not 'validation': set --dataset_train_split"):
        path = write(tmp_path / "a.json")
        splits = DatasetDict({"train": Dataset.from_list(ROWS)})
        splits.save_to_disk(str(tmp_path / "saved"))
        load_splits(ScriptArguments(dataset_path=str(tmp_path / "saved"), dataset_train_split="validation"))
    write(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="files of one kind"):
        load_splits(ScriptArguments(dataset_path=str(tmp_path)))
    assert path.exists()


def test_a_demonstration_makes_the_context():
    args = ScriptArguments(
        golden_response_column="answer",
        system_column="system",
        demonstration_template="$orig_content -> $output_text $$1",
    )
    mapped = map_columns(Dataset.from_list(ROWS), args)
    assert mapped.column_names == ["prompt", "privileged_context"]
    assert mapped[0]["privileged_context"] == "Why? -> Because. $1"
    assert mapped[0]["prompt"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    ]  # fmt: skip


def test_a_rows_own_context_comes_first():
    rows = [
        {"prompt": "a", "privileged_context": "own", "golden_response": "x"},
        {"prompt": "b", "privileged_context": None, "golden_response": "y"},
    ]
    mapped = map_columns(Dataset.from_list(rows), ScriptArguments())
    assert mapped["privileged_context"] == ["own", "Example response: y"]


def test_values_in_a_demonstration_are_verbatim():
    rows = [{"prompt": "${output_text} {x}", "golden_response": "$orig_content {{ y }} $5"}]
    args = ScriptArguments(demonstration_template="$orig_content|$output_text")
    assert map_columns(Dataset.from_list(rows), args)[0]["privileged_context"] == (
        "${output_text} {x}|$orig_content {{ y }} $5"
    )


@pytest.mark.parametrize("template", ["no placeholder", "$output_text $other", "$output_text costs $5"])
def test_bad_demonstration_templates_are_refused(template):
    args = ScriptArguments(golden_response_column="answer", demonstration_template=template)
    with pytest.raises(ValueError, match="demonstration_template"):
        map_columns(Dataset.from_list(ROWS), args)


def test_columns_that_are_missing():
    with pytest.raises(ValueError, match="--prompt_column=question.*prompt, answer, system"):
        map_columns(Dataset.from_list(ROWS), ScriptArguments(prompt_column="question"))
    with pytest.raises(ValueError, match="lacks privileged_context"):
        map_columns(Dataset.from_list(ROWS), ScriptArguments())


def test_supervised_fine_tuning_keeps_the_response_itself():
    rows = [
        {"prompt": "a", "privileged_context": "own", "golden_response": "x"},
        {"prompt": "b", "privileged_context": None, "golden_response": [{"role": "assistant", "content": "y"}]},
        {"prompt": "c", "privileged_context": "hint", "golden_response": None},
    ]
    mapped = map_columns(Dataset.from_list(rows[:1]), ScriptArguments(method="sft"))
    assert mapped[0] == {"prompt": "a", "privileged_context": "own", "golden_response": "x"}
    mapped = map_columns(Dataset.from_list(rows[1:]), ScriptArguments(method="sft"))
    assert mapped["privileged_context"] == ["Example response: y", "hint"] and mapped["golden_response"] == ["y", None]
    without = Dataset.from_list([{"prompt": "a", "privileged_context": "own"}])
    assert map_columns(without, ScriptArguments(method="sft")).column_names == ["prompt", "privileged_context"]
