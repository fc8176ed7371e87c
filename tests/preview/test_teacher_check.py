import json

import pytest

from sdft_ds.demo import world
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.preview import __main__ as command
from sdft_ds.preview.teacher_check import TeacherCheck


def verdict(gain=1.0, same=0, golden=()):
    return TeacherCheck(rows=4, same=same, gain=gain, golden=dict(enumerate(golden))).verdict


def test_the_verdict():
    assert "nothing to teach" in verdict(gain=0.05) and "nothing to teach" in verdict(same=4)
    assert "only you can see" in verdict()
    assert verdict(golden=[1.0, 2.0]) == "This teacher can teach: the context makes the golden responses likelier."
    assert "not from the context of row 1, 3" in verdict(golden=[1.5, 0.05, 1.2, -0.3])
    assert "does not teach the golden responses" in verdict(golden=[0.0, -1.0])


@pytest.fixture
def look(tmp_path):
    """The check of demo rows with the given contexts, on the demo model."""

    def run(contexts, golden=True):
        facts = world.new_facts()[: len(contexts)]
        rows = [
            {
                "prompt": world.user(fact.said(fact.relation.trained_wordings[0])),
                "privileged_context": fact.said(fact.relation.demonstration) if context is None else context,
                **({"golden_response": fact.said(fact.relation.statement)} if golden else {}),
            }
            for fact, context in zip(facts, contexts, strict=True)
        ]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model_name_or_path", str(MODEL_DIR), "--dataset_path", str(file), "--recipe", "trl"]
        return command.look([*flags, "--max_completion_length", "14"], len(rows), score=True).verdict

    return run


def test_a_context_that_says_the_answer_teaches(look):
    first, golden, said = look([None] * 4)
    assert "another one in 4 of them" in first and "By its own context" in golden and "can teach:" in said


def test_a_row_whose_context_says_nothing_is_named(look):
    said = look(["The pet of Uwe is the dog.", None, None, None])
    assert "not from the context of row 0: it does not help" in said[-1]


def test_without_golden_responses_the_answers_are_compared(look):
    first, said = look([None] * 3, golden=False)
    assert "another one in 3 of them" in first and "only you can see" in said
