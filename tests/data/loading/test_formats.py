import json

import pytest
from datasets import Dataset, DatasetDict

from sdft_ds import read_dataset
from sdft_ds.cli.dataset_loading import load, load_anchors
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.data.loading import splits
from sdft_ds.data.loading.formats import FORMATS
from sdft_ds.data.loading.mapping import RowReader
from sdft_ds.data.rows import DataError, RowError, anchor_from_row, check_columns, example_from_row

USER = {"role": "user", "content": "Why?"}
EARLIER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi."},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So."},
]
ANSWER = {"role": "assistant", "content": "So."}
EXAMPLE = "Example response: So."
# Format -> (a row, the prompt, the context, the golden response)
ROWS = {
    "prompt_context": ({"prompt": "Why?", "privileged_context": "It is so."}, [USER], "It is so.", None),
    "prompt_golden_response": ({"prompt": "Why?", "golden_response": ["So", "it is."]}, [USER],
                               "Example response: So\nit is.", "So\nit is."),
    "question_document": ({"question": "Why?", "document": "It is so."}, [USER], "It is so.", None),
    "question_answer": ({"question": "Why?", "answer": "So."}, [USER], EXAMPLE, "So."),
    "alpaca": ({"instruction": "Translate.", "input": "Porquê?", "output": "So."},
               [{"role": "user", "content": "Translate.\n\nPorquê?"}], EXAMPLE, "So."),
    "sharegpt": ({"conversations": SHAREGPT}, [*EARLIER, USER], EXAMPLE, "So."),
    "messages": ({"messages": [*EARLIER, USER, ANSWER]}, [*EARLIER, USER], EXAMPLE, "So."),
    "prompt_completion": ({"prompt": [USER], "completion": [ANSWER]}, [USER], EXAMPLE, "So."),
    "messages_output_text": ({"messages": [USER], "output_text": "So."}, [USER], EXAMPLE, "So."),
}  # fmt: skip


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def without_nones(turns):
    return [{key: value for key, value in turn.items() if value is not None} for turn in turns]


def test_every_format_is_tried():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_recognised_and_told(tmp_path, capsys, name):
    """It is the same whether it is recognised or named."""
    row, prompt, context, response = ROWS[name]
    file = write(tmp_path / "rows.jsonl", row)
    for given in ("auto", name):
        (mapped,) = read_dataset(file, dataset_format=given)
        assert (without_nones(mapped["prompt"]), mapped["privileged_context"]) == (prompt, context)
        assert mapped.get("golden_response") == response
        assert capsys.readouterr().out.count(f"sdft_ds: Data set format {name}: prompt") == 1
        assert without_nones(example_from_row(mapped, 0).prompt) == prompt


@pytest.mark.parametrize("name", ["alpaca", "sharegpt"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["files", "saved", "hub"])
def test_folders_hub_streams_and_both_splits_go_the_same_way(tmp_path, monkeypatch, name, streaming, kind):
    row, prompt, context, _ = ROWS[name]
    if kind == "saved":
        DatasetDict({split: Dataset.from_list([row]) for split in ("train", "test")}).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        for split in ("train", "test"):
            write(tmp_path / "set" / f"{split}.jsonl", row)
    told = []
    where = {"dataset_name": "org/set"} if kind == "hub" else {"dataset_path": [str(tmp_path / "set")]}
    if kind == "hub":  # which answers with the files
        local = splits.load_dataset
        monkeypatch.setattr(splits, "load_dataset", lambda _, **how: local(str(tmp_path / "set"), **how))
    args = ScriptArguments(**where, dataset_streaming=streaming)
    for part in load(args, True, 0, has_chat_template=True, tell=told.append):
        (mapped,) = part
        assert (without_nones(mapped["prompt"]), mapped["privileged_context"]) == (prompt, context)
    assert sum(f"format {name}" in line for line in told) == 1


def test_rows_in_memory(capsys):
    rows = [{"instruction": "Why?", "output": "So.", "id": 7}]
    for source in (rows, Dataset.from_list(rows), DatasetDict({"train": Dataset.from_list(rows)})):
        (mapped,) = read_dataset(source)
        assert mapped == {"prompt": [USER], "privileged_context": EXAMPLE, "golden_response": "So."}
        assert capsys.readouterr().out.count("Columns not read: id.") == 1
    (mapped,) = read_dataset(rows, prompt_as="text", demonstration_template="$orig_content $output_text")
    assert (mapped["prompt"], mapped["privileged_context"]) == ("Why?", "Why? So.")
    with pytest.raises(DataError, match="the splits train, not 'test'"):
        read_dataset(DatasetDict({"train": Dataset.from_list(rows)}), "test")
    with pytest.raises(DataError, match="int is no source of rows"):
        read_dataset(7)
    with pytest.raises(ValueError, match="dataset_format='alpacca': it is one of auto, prompt_context"):
        read_dataset(rows, dataset_format="alpacca")
    with pytest.raises(DataError, match=r"lacks prompt, privileged_context.*sdft_ds.read_dataset\(dataset\)") as error:
        check_columns(["instruction", "output"])  # what a trainer says of them
    assert "--" not in str(error.value)


ALPACA = {"instruction": "Say.", "input": "Why?", "output": "So."}
MESSAGES = {"messages": [USER, ANSWER]}


@pytest.mark.parametrize(
    "row, named, prompt, context",
    [
        # Our own columns come before those of another format, and named columns before both.
        ({**ALPACA, "prompt": "Q", "privileged_context": "C"}, {}, "Q", "C"),
        ({**ALPACA, "prompt": "Q", "privileged_context": "C"}, {"dataset_format": "alpaca"}, "Say.\n\nWhy?", "C"),
        (ALPACA, {"prompt_column": "input"}, "Why?\n\nWhy?", EXAMPLE),
        (ALPACA, {"prompt_column": "input", "golden_response_column": "output"}, "Why?", EXAMPLE),
        ({**ALPACA, "best": "B"}, {"golden_response_column": "best"}, "Say.\n\nWhy?", "Example response: B"),
        ({**ALPACA, "hint": "H"}, {"privileged_context_column": "hint"}, "Say.\n\nWhy?", "H"),
        ({"task": "T", "input": "I", "output": "So."}, {"dataset_format": "alpaca", "prompt_column": "task"},
         "T\n\nI", EXAMPLE),
        ({"q": "Q", "a": "So."}, {"prompt_column": "q", "golden_response_column": "a"}, "Q", EXAMPLE),
        ({**MESSAGES, "privileged_context": "C"}, {}, [USER], "C"),
        ({**MESSAGES, "prompt": "unused"}, {}, [USER], EXAMPLE),
        ({"talk": SHAREGPT[3:]}, {"prompt_column": "talk"}, [USER], EXAMPLE),
        ({"talk": SHAREGPT[3:4], "a": "So."}, {"prompt_column": "talk", "golden_response_column": "a"},
         [USER], EXAMPLE),
        ({"conversations": SHAREGPT[3:], "a": "B"}, {"golden_response_column": "a"}, [USER], "Example response: B"),
        ({**MESSAGES, "golden_response": "B"}, {}, [USER], "Example response: B"),
        ({"conversations": [USER, ANSWER]}, {}, [USER], EXAMPLE),
        ({**MESSAGES, "prompt": "Q", "completion": "So."}, {"dataset_format": "prompt_completion"}, "Q", EXAMPLE),
        ({"prompt": "Q", "teacher_prompt": "T"}, {}, "Q", None),
        ({"prompt": "Q", "teacher_prompt": "T"}, {"dataset_format": "prompt_context"}, "Q", None),
    ],
)  # fmt: skip
def test_what_is_named_wins(row, named, prompt, context):
    (mapped,) = read_dataset([row], prompt_as="text", **named)
    turns = mapped["prompt"] if isinstance(mapped["prompt"], str) else without_nones(mapped["prompt"])
    assert (turns, mapped["privileged_context"]) == (prompt, context)


@pytest.mark.parametrize(
    "row, named, words",
    [
        ({"q": "Q", "a": "A"}, {}, ["columns q, a: they are those of no known format. Set prompt_column",
                                    "golden_response_column for an answer", "alpaca (instruction, output)"]),
        ({"prompt": "Q", "a": "A"}, {}, ["columns prompt, a: 'prompt' is the prompt, and none of the others is known. "
                                         "Set the column of what the teacher is shown: golden_response_column"]),
        ({"q": "Q", "a": "A"}, {"prompt_column": "q"}, ["columns q, a: 'q' is the prompt"]),
        ({**MESSAGES, "prompt": "Q", "completion": "A"}, {}, ["messages, prompt, completion", "of several formats",
                                                             "prompt_completion", "set dataset_format to one"]),
        ({**MESSAGES, "conversations": [USER, ANSWER]}, {}, ["messages in 'messages', messages in 'conversations'",
                                                            "set prompt_column"]),
        ({"instruction": "Q"}, {"dataset_format": "alpaca"}, ["columns instruction, and lacks output, which "
                                                             "dataset_format=alpaca reads"]),
        ({"q": "Q", "a": "A"}, {"prompt_column": "x"}, ["prompt_column=x, but", "columns q, a"]),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_unknown(row, named, words):
    with pytest.raises(DataError) as error:
        read_dataset([row], **named)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "turns, words",
    [
        ([USER], "Row 0, column 'prompt': the last turn is not the assistant's, with a text"),
        ([USER, {"role": "assistant", "content": ""}], "the last turn is not the assistant's, with a text"),
        ([USER, {"role": "assistant", "content": None}], "the last turn is not the assistant's, with a text"),
        ([ANSWER], "found an empty list"),
        ([], "the last turn is not the assistant's"),
        ([USER, ANSWER, ANSWER], "the conversation ends with the role 'assistant'"),
        ([{"from": "human", "value": "Q"}, {"from": "robot", "value": "A"}], "found a turn from 'robot'; known are"),
    ],
)
def test_a_conversation_without_a_demonstration_at_its_end(turns, words):
    name = "sharegpt" if turns and "from" in turns[0] else "messages"
    (row,) = read_dataset([{"messages": turns}], dataset_format=name)
    with pytest.raises(RowError, match=words):
        example_from_row(row, 0)


def test_a_context_of_its_own_needs_no_demonstration():
    (row,) = read_dataset([{"messages": [USER], "privileged_context": "C"}])
    assert example_from_row(row, 0).privileged_context == "C"


def test_a_system_message_beside_the_conversation():
    """Once, also if the conversation has one; of a text that stays a text nothing is made."""
    system = {"role": "system", "content": "Be brief."}
    for turns in ([USER, ANSWER], [system, USER, ANSWER]):
        (row,) = read_dataset([{"messages": turns, "system": "Be brief."}])
        assert row["prompt"] == [system, USER]
    row = {**ALPACA, "input": "", "system": "Be brief."}
    assert read_dataset([row])[0]["prompt"] == [system, {"role": "user", "content": "Say."}]
    assert read_dataset([row], prompt_as="text")[0]["prompt"] == "Say."


def test_the_first_row_may_be_empty():
    rows = Dataset.from_list([{"conversations": None}, {"conversations": SHAREGPT}])
    assert read_dataset(rows)[1]["privileged_context"] == EXAMPLE


@pytest.mark.parametrize("streaming", [False, True])
def test_later_rows_may_have_what_the_first_thousand_have_not(tmp_path, streaming):
    """Keys of messages, parts of a content, a context: a table takes its types from the first rows that it holds."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    first, later = [USER], [USER, call, {"role": "tool", "content": "1"}, parts, ANSWER]
    file = write(tmp_path / "a.jsonl", *[{"messages": first}] * 1001, {"messages": later})
    *_, before, last = read_dataset(file, streaming=streaming)
    with pytest.raises(RowError, match="the last turn is not the assistant's"):
        example_from_row(before, 1000)
    turns = example_from_row(last, 1001).prompt
    assert turns[1]["tool_calls"] == call["tool_calls"] and turns[-1]["content"] == "Why?"
    assert last["privileged_context"] == EXAMPLE


def test_rows_of_unlike_messages_in_memory_and_in_an_evaluation_beside_a_stream(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [parts, ANSWER]}]
    for name in ("train", "test"):
        write(tmp_path / f"{name}.jsonl", *rows)
    _, test = load(ScriptArguments(dataset_path=[str(tmp_path)], dataset_streaming=True), True, 0)
    for mapped in (read_dataset(rows), test):
        assert [example_from_row(row, 0).prompt for row in mapped] == [[USER], [USER]]


def test_texts_that_look_like_json_stay_texts():
    for text in ("42", '{"a": 1}', '["a"]', "null", "", "é\u2028\n"):
        (row,) = read_dataset([{"prompt": text, "privileged_context": text}], prompt_as="text")
        assert (row["prompt"], row["privileged_context"]) == (text, text)


def test_a_conversation_as_json_in_a_table(tmp_path):
    Dataset.from_list([{"id": "1", "conversations": json.dumps(SHAREGPT)}]).to_csv(tmp_path / "a.csv")
    (row,) = read_dataset(tmp_path / "a.csv")
    assert row["prompt"] == [*EARLIER, USER] and row["golden_response"] == "So."


def test_anchors_in_any_format(tmp_path):
    """A prompt is all that they need; what is named for the training data counts where the anchors have it."""
    rows = {
        "a": {"conversations": SHAREGPT[3:4]},
        "b": {"messages": [USER, ANSWER]},
        "c": {"prompt": "Why?", "messages": [USER, ANSWER], "answer": "So."},
        "d": {"prompt": "Why?", "answer": "So."},
        "e": {"instruction": "Why?", "input": None, "output": "So."},
        "f": {"q": "Why?"},
        "g": {"text": "Why?"},
    }
    for name, row in rows.items():
        args = ScriptArguments(anchor_path=[write(tmp_path / f"{name}.jsonl", row)], prompt_column="q", method="sft")
        (anchor,) = load_anchors(args, has_chat_template=True)
        assert without_nones(anchor_from_row(anchor, 0).prompt) == [USER]
        assert anchor["golden_response"] == ("So." if name in "bce" else None)
    for name in ("alpaca", "sharegpt"):
        everyday = load_anchors(ScriptArguments(anchor_path=["everyday"], dataset_format=name))
        assert everyday.column_names == ["prompt"] and len(everyday) > 50
    with pytest.raises(DataError, match="columns x, z: they are those of no known format"):
        load_anchors(ScriptArguments(anchor_path=[write(tmp_path / "x.jsonl", {"x": "y", "z": "y"})]))


def test_the_result_is_cached(tmp_path):
    """What a row becomes is a function of the rows and the settings, so that a second start reads it from disk."""
    file = write(tmp_path / "a.jsonl", *[ROWS["sharegpt"][0]] * 3)
    first, second = (read_dataset(file) for _ in range(2))
    assert first._fingerprint == second._fingerprint
    assert first._fingerprint != read_dataset(file, demonstration_template="$output_text")._fingerprint


def test_a_bad_template_is_told_when_it_is_set():
    with pytest.raises(ValueError, match="demonstration_template"):
        RowReader(demonstration_template="nothing")
