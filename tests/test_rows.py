import pytest

from sdft_ds.rows import RowError, check_columns, example_from_row


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
