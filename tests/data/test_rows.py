import json

import pytest

from sdft_ds.data.rows import RowError, check_columns, example_from_row


def row(**changes):
    return {"prompt": "What?", "privileged_context": "That.", **changes}


def test_text_and_conversation():
    assert example_from_row(row(), 0).prompt == "What?"
    conversation = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What?"}]
    assert example_from_row(row(prompt=conversation), 0).prompt == conversation


def test_text_parts_become_text():
    parts = [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]
    example = example_from_row(row(prompt=[{"role": "user", "content": parts}]), 0)
    assert example.prompt == [{"role": "user", "content": "What now?"}]


def test_context_messages_are_joined_by_newlines():
    messages = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    assert example_from_row(row(privileged_context=messages), 0).privileged_context == "One\nTwo"


def test_context_texts_are_joined_by_newlines():
    assert example_from_row(row(privileged_context=["One", "Two"]), 0).privileged_context == "One\nTwo"


def test_a_teacher_prompt_makes_the_context_unnecessary():
    made = example_from_row({"prompt": "What?", "teacher_prompt": "Told: what?"}, 0)
    assert made.teacher_prompt == "Told: what?" and made.privileged_context == ""
    assert example_from_row(row(teacher_prompt=None), 0).privileged_context == "That."


TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"query": {"type": "string"}, "n": None}}}]


@pytest.mark.parametrize("value", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_schemas_or_their_json_without_what_a_table_filled_in(value):
    made = example_from_row(row(prompt=[{"role": "user", "content": "What?", "tool_calls": None}], tools=value), 0)
    assert made.tools[0]["function"]["parameters"] == {"query": {"type": "string"}}
    assert made.prompt == [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize("value", [None, [], ""])
def test_no_tools(value):
    assert example_from_row(row(tools=value), 0).tools is None


def test_a_turn_that_only_calls_a_tool_has_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    turns = [
        {"role": "user", "content": "A"},
        call,
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "B"},
    ]
    assert example_from_row(row(prompt=turns), 0).prompt[1] == {**call, "content": ""}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt": None}, ["Row 7", "'prompt'", "nothing"]),
        ({"prompt": ""}, ["Row 7", "'prompt'", "empty text"]),
        ({"prompt": []}, ["Row 7", "'prompt'", "empty list"]),
        ({"prompt": 5}, ["Row 7", "'prompt'", "int"]),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         ["Row 7", "'assistant'", "end with the user"]),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, ["Row 7", "image", "only text"]),
        ({"prompt": [{"role": "user", "content": None}]}, ["Row 7", "'prompt'", "NoneType"]),
        ({"prompt": " \n"}, ["Row 7", "'prompt'"]),
        ({"prompt": [{"role": "user", "content": " "}]}, ["Row 7", "'prompt'", "last turn is empty"]),
        ({"prompt": "a\0b"}, ["Row 7", "'prompt'", "NUL character at position 1"]),
        ({"prompt": "a\ud800"}, ["Row 7", "'prompt'", "surrogate pair at position 1"]),
        ({"prompt": [{"role": "user", "content": "\0"}]}, ["Row 7", "'prompt'", "NUL"]),
        ({"prompt": [{"role": "user", "content": ["text"]}]}, ["Row 7", "str", "only text"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, ["Row 7", "without a 'text'"]),
        ({"prompt": [{"role": None, "content": "a"}]}, ["Row 7", "'prompt'", "list"]),
        ({"privileged_context": "a\0b"}, ["Row 7", "'privileged_context'", "NUL"]),
        ({"privileged_context": ["a", 5]}, ["Row 7", "'privileged_context'", "list"]),
        ({"privileged_context": []}, ["Row 7", "'privileged_context'", "empty list"]),
        ({"teacher_prompt": ""}, ["Row 7", "'teacher_prompt'", "empty text"]),
        ({"teacher_prompt": [{"role": "user", "content": "a"}]}, ["Row 7", "'teacher_prompt'", "make both the same"]),
        ({"tools": TOOLS}, ["Row 7", "'tools'", "tools need a conversation"]),
        ({"tools": "{not json"}, ["Row 7", "'tools'", "list of function schemas"]),
        ({"tools": ["search"]}, ["Row 7", "'tools'", "list of function schemas"]),
        ({"privileged_context": None}, ["Row 7", "'privileged_context'", "nothing"]),
        ({"privileged_context": ""}, ["Row 7", "'privileged_context'", "empty text"]),
        ({"privileged_context": 3.5}, ["Row 7", "'privileged_context'", "float"]),
    ],
)  # fmt: skip
def test_errors_name_the_row_and_the_column(changes, words):
    with pytest.raises(RowError) as error:
        example_from_row(row(**changes), 7)
    assert all(word in str(error.value) for word in words)


def test_missing_columns_list_what_was_found():
    with pytest.raises(ValueError, match="question, answer.*lacks prompt, privileged_context"):
        check_columns(["question", "answer"])
    check_columns(["prompt", "teacher_prompt"])
