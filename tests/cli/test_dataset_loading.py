import json
import shutil

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from sdft_ds.cli.dataset_loading import load, load_splits, row_reader
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.data.loading import splits
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import RowError, example_from_row
from sdft_ds.data.streams import Stream
from sdft_ds.data.validation import STRICT, validate_dataset

ROWS = [{"prompt": "Why?", "answer": "Because.", "system": "Be brief."}, {"prompt": "How?", "answer": "So.",
                                                                       "system": "Be kind."}]  # fmt: skip


def map_columns(rows, args):
    return row_reader(args, has_chat_template=False).read(rows, args.source)


def write(path, rows=ROWS):
    if path.suffix in (".json", ".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path)
    elif path.suffix == ".arrow":
        Dataset.from_list(rows).save_to_disk(path.with_suffix(""))
        next(path.with_suffix("").glob("*.arrow")).rename(path)
        shutil.rmtree(path.with_suffix(""))
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "rows.arrow"])
def test_a_file_is_the_training_split(tmp_path, name):
    splits = load_splits(ScriptArguments(dataset_path=[str(write(tmp_path / name))]))
    assert splits["train"]["prompt"] == ["Why?", "How?"] and list(splits) == ["train"]


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "train-0.jsonl")
    write(tmp_path / "train-1.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    splits = load_splits(ScriptArguments(dataset_path=[str(tmp_path)]))
    assert len(splits["train"]) == 4 and len(splits["test"]) == 1


def test_in_a_folder_a_word_of_the_name_says_the_split(tmp_path):
    """Also below it, as downloads from the hub are; and `latest` is no test."""
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "data" / "latest.jsonl")
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", ROWS[:1])
    write(tmp_path / ".cache" / "old.jsonl")
    splits = load_splits(ScriptArguments(dataset_path=[str(tmp_path)]))
    assert len(splits["train"]) == 2 and len(splits["test"]) == 1


def test_several_files_and_patterns(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl", "test.jsonl"):
        write(tmp_path / name)
    splits = load_splits(ScriptArguments(dataset_path=[str(tmp_path / "a.jsonl"), str(tmp_path / "test.jsonl")]))
    assert len(splits["train"]) == 2 and len(splits["test"]) == 2
    assert len(load_splits(ScriptArguments(dataset_path=[str(tmp_path / "[ab].jsonl")]))["train"]) == 4
    with pytest.raises(FileNotFoundError, match=r"x\*.jsonl fits no file"):
        load_splits(ScriptArguments(dataset_path=[str(tmp_path / "x*.jsonl")]))


def test_a_data_set_on_the_hub_has_revision_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return DatasetDict({"fit": Dataset.from_list(ROWS)})

    monkeypatch.setattr(splits, "load_dataset", load_dataset)
    args = ScriptArguments(
        dataset_name="org/set", dataset_config="c", dataset_revision="r", dataset_train_split="fit",
        golden_response_column="answer",
    )  # fmt: skip
    train, _ = load(args, False, 0)
    assert asked == [(("org/set",), {"name": "c", "revision": "r", "streaming": False})]
    assert train.info.dataset_name == "org/set; privileged_context from 'answer'"


@pytest.mark.parametrize("make", [Dataset.from_list, lambda rows: DatasetDict({"train": Dataset.from_list(rows)})])
def test_a_save_to_disk_folder(tmp_path, make):
    make(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert len(load_splits(ScriptArguments(dataset_path=[str(tmp_path / "saved")]))["train"]) == 2


def test_errors_name_the_path_and_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.json does not exist"):
        load_splits(ScriptArguments(dataset_path=[str(tmp_path / "missing.json")]))
    with pytest.raises(ValueError, match=r"holds no \.json"):
        load_splits(ScriptArguments(dataset_path=[str(tmp_path)]))
    with pytest.raises(ValueError, match="not 'validation': set --dataset_train_split"):
        path = write(tmp_path / "a.json")
        splits = DatasetDict({"train": Dataset.from_list(ROWS)})
        splits.save_to_disk(str(tmp_path / "saved"))
        load_splits(ScriptArguments(dataset_path=[str(tmp_path / "saved")], dataset_train_split="validation"))
    with pytest.raises(ValueError, match="files of one kind"):
        load_splits(ScriptArguments(dataset_path=[str(path), str(write(tmp_path / "b.csv"))]))
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


BROKEN = {
    "half.jsonl": b'{"prompt": "a"}\n{"prompt": "b",\n',
    "binary.jsonl": b"\xff\xfe\x00garbage",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "latin.jsonl": b'{"prompt": [{"role": "us\xe9r", "content": "a"}], "golden_response": "b"}\n',
    "null.jsonl": b"null\n",  # on which pyarrow ends the process
    "short.csv": b"prompt,answer\na,b\nc,d,e\n",
    "no.parquet": b"nope",
    "no.arrow": b"nope",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, tokenizer, name, streaming):
    (tmp_path / name).write_bytes(BROKEN[name])
    args = ScriptArguments(dataset_path=[str(tmp_path / name)], dataset_streaming=streaming,
                           golden_response_column="answer" if name == "short.csv" else "golden_response")  # fmt: skip
    with pytest.raises(ValueError, match=name) as error:
        train, _ = load(args, False, 0)
        Stream(train, PromptBuilder(tokenizer, "{prompt} {privileged_context}", None, None), STRICT)[2]
    assert "\n" not in str(error.value)


def test_a_share_of_the_rows_is_held_out(tmp_path):
    rows = [{"prompt": f"Q{i}", "privileged_context": "hint"} for i in range(10)]
    args = ScriptArguments(dataset_path=[str(write(tmp_path / "a.jsonl", rows))], eval_fraction=0.3)
    train, test = load(args, True, seed=1)
    again, _ = load(args, True, seed=1)
    other, _ = load(args, True, seed=2)
    train, test, again, other = ([row["prompt"] for row in part] for part in (train, test, again, other))
    assert (len(train), len(test)) == (7, 3) and sorted(train + test) == [row["prompt"] for row in rows]
    assert train == again != other
    with pytest.raises(ValueError, match="--eval_fraction has no effect without --eval_strategy"):
        load(args, False, seed=1)
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        load(ScriptArguments(dataset_path=[str(write(tmp_path / "b.jsonl", rows[:1]))], eval_fraction=0.3), True, 1)


def test_messages_about_held_out_rows_have_the_numbers_of_the_file(tmp_path, tokenizer):
    rows = [{"prompt": f"Q{i}", "privileged_context": None if i == 6 else "hint"} for i in range(10)]
    args = ScriptArguments(dataset_path=[str(write(tmp_path / "a.jsonl", rows))], eval_fraction=0.5)
    prompts = PromptBuilder(tokenizer, "{prompt} {privileged_context}", None, None)
    with pytest.raises(ValueError, match=r"part \(.*a.jsonl, split train\): Row 6, column 'privileged_context'"):
        for part in load(args, True, seed=1):
            validate_dataset(part, "part", prompts)


def test_evaluation_beside_a_stream_reads_its_split_whole(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl")
    args = ScriptArguments(dataset_path=[str(tmp_path)], dataset_streaming=True, golden_response_column="answer")
    train, test = load(args, True, seed=1)
    assert isinstance(train, IterableDataset) and [row["prompt"] for row in train] == ["Why?", "How?"]
    assert test["prompt"] == ["Why?", "How?"] and "split test" in test.info.dataset_name
    with pytest.raises(
        ValueError, match="needs the split 'test'; .* has train. Set --dataset_test_split, or --eval_f"
    ):
        load(ScriptArguments(dataset_path=[str(tmp_path / "train.jsonl")], golden_response_column="answer"), True, 1)


OFFICIAL = {
    "prompt_golden_response": {"prompt": "Why?", "golden_response": ["Because", "so."]},
    "messages_output_text": {"messages": [{"role": "user", "content": "Why?"}], "output_text": "Because\nso."},
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_formats_of_the_authors_data(name):
    mapped = map_columns(Dataset.from_list([OFFICIAL[name]]), ScriptArguments(dataset_format=name))
    assert mapped[0]["privileged_context"] == "Example response: Because\nso."
    assert mapped[0]["prompt"] in ("Why?", [{"role": "user", "content": "Why?"}])


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dataset_path": ["a"], "dataset_name": "b"}, "both set"),
        ({"dataset_path": ["a"], "dataset_revision": "b"}, "dataset_revision needs --dataset_name"),
        ({"eval_fraction": 1.0}, "eval_fraction must be in \\(0, 1\)"),
        ({"eval_fraction": 0.1, "dataset_streaming": True}, "eval_fraction is not possible with --dataset_streaming"),
    ],
)
def test_settings_that_contradict_each_other(settings, words):
    with pytest.raises(ValueError, match=words):
        ScriptArguments(**settings)


def test_teacher_prompts_and_tools_are_taken_along(tmp_path):
    tools = [
        [{"function": {"name": "f", "parameters": {"a": 1}}}],
        [{"function": {"name": "g", "parameters": {"b": ""}}}],
    ]
    turn = [{"role": "user", "content": "Q"}]
    rows = [{"prompt": turn, "seen": "Told: Q", "functions": each} for each in tools]
    file = write(tmp_path / "a.jsonl", rows)
    args = ScriptArguments(dataset_path=[str(file)], teacher_prompt_column="seen", tools_column="functions")
    examples = [example_from_row(row, i) for i, row in enumerate(load(args, False, 0)[0])]
    assert [example.tools for example in examples] == tools
    assert examples[0].teacher_prompt == "Told: Q" and examples[0].prompt == turn


@pytest.mark.parametrize("prompt", [None, "", [], "Why?", [{"role": "user", "content": None}]])
@pytest.mark.parametrize("response", [None, "", [], {"content": None}, [{"content": [{"type": "image"}]}]])
def test_rows_that_cannot_be_used_are_left_for_the_trainer_to_name(prompt, response):
    rows = Dataset.from_list([{"prompt": prompt, "golden_response": response}])
    with pytest.raises(RowError, match="Row 0, column '(prompt|privileged_context)'"):
        example_from_row(map_columns(rows, ScriptArguments(dataset_path=["f"]))[0], 0)


def test_columns_that_are_missing():
    with pytest.raises(ValueError, match="prompt_column=question.*prompt, answer, system"):
        map_columns(Dataset.from_list(ROWS), ScriptArguments(prompt_column="question"))
    with pytest.raises(ValueError, match="prompt, answer, system: 'prompt' is the prompt, and none"):
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


def test_columns_that_are_not_read_are_named_once(tmp_path):
    rows = [{"instruction": "Do.", "input": "This.", "output": "Done.", "chat_template_kwargs": {"a": 1}}]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", rows)
    columns = {"prompt_column": "instruction", "golden_response_column": "output"}
    for streaming in (False, True):
        told = []
        args = ScriptArguments(dataset_path=[str(tmp_path)], dataset_streaming=streaming, **columns)
        load(args, True, 0, tell=told.append)
        _, line = told
        assert line == (
            "Columns not read: input, chat_template_kwargs. chat_template_kwargs is a setting, for all rows alike."
        )
    load(ScriptArguments(dataset_path=[str(write(tmp_path / "b.jsonl"))], golden_response_column="answer",
                         system_column="system"), False, 0, tell=told.append)  # fmt: skip
    assert len(told) == 4 and not any("not read" in line for line in told[2:])


@pytest.mark.parametrize(
    "prompt_as, has_chat_template, as_user",
    [(None, True, True), (None, False, False), ("text", True, False), ("user", False, True)],
)
def test_a_text_prompt_becomes_the_users_turn_where_there_is_a_chat_template(
    tmp_path, prompt_as, has_chat_template, as_user
):
    """On the command line, in both splits; of a stream as well."""
    turn = [{"role": "user", "content": "Why?"}]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": "Why?", "golden_response": "So."}])
    for streaming in (False, True):
        told = []
        args = ScriptArguments(dataset_path=[str(tmp_path)], dataset_streaming=streaming, prompt_as=prompt_as)
        for split in load(args, True, 0, has_chat_template, told.append):
            (row,) = split
            assert row["prompt"] == (turn if as_user else "Why?")
            assert row["privileged_context"] == "Example response: So."
        assert [True, *["prompt_as text" in line for line in told[1:]]] == [True, *[True] * as_user]
    write(tmp_path / "c.jsonl", [{"prompt": turn, "golden_response": "So."}])
    load(ScriptArguments(dataset_path=[str(tmp_path / "c.jsonl")]), False, 0, has_chat_template=True, tell=told.append)
    assert sum("prompt_as" in line for line in told) == as_user  # nothing becomes of a conversation


def test_columns_for_functions_of_ones_own_are_kept():
    rows = Dataset.from_list([{"question": "Why?", "answer": "B", "kind": "mcq"}])
    script = ScriptArguments(prompt_column="question", method="sdpo")
    (row,) = map_columns(rows, script)
    kept = {"question": "Why?", "answer": "B", "kind": "mcq"}
    assert row == {**kept, "prompt": "Why?", "privileged_context": None, "golden_response": "B"}
    with pytest.raises(ValueError, match="none of the others is known"):
        map_columns(rows.remove_columns("answer"), ScriptArguments(prompt_column="question"))


def test_a_golden_response_is_no_feedback_but_what_a_reward_compares_with():
    rows = Dataset.from_list([{"prompt": "Why?", "golden_response": "So."}])
    (row,) = map_columns(rows, ScriptArguments(method="sdpo"))
    assert row == {"prompt": "Why?", "privileged_context": None, "golden_response": "So."}
    (row,) = map_columns(rows, ScriptArguments(privileged_context_fn="tests.cli.functions.hints"))
    assert row == {"prompt": "Why?", "privileged_context": "Example response: So.", "golden_response": "So."}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_conversations_that_a_table_holds_as_json(tmp_path, name):
    turn, answer = [{"role": "user", "content": "Why?"}], [{"role": "assistant", "content": "So."}]
    rows = [
        {"prompt": json.dumps(turn), "completion": json.dumps(answer)},
        {"prompt": '[{"a": 1}, 2] is a list?', "completion": "[]"},  # texts that only begin like one
    ]
    train, _ = load(ScriptArguments(dataset_path=[str(write(tmp_path / name, rows))]), False, 0, True)
    assert [row["prompt"] for row in train] == [turn, [{"role": "user", "content": rows[1]["prompt"]}]]
    assert train["privileged_context"] == ["Example response: So.", "Example response: []"]
