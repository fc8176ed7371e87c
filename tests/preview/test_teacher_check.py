import json

import pytest
import torch

from sdft_ds import train
from sdft_ds.demo import world
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.preview import __main__ as command
from sdft_ds.preview.teacher_check import TaskAccuracy, TeacherCheck, check
from tests.helpers.trainers import make_trainer


def verdict(gain=1.0, same=0, golden=(), tasks=()):
    by_name = {f"t{i}": TaskAccuracy(8, *accuracies) for i, accuracies in enumerate(tasks)}
    return TeacherCheck(rows=4, same=same, gain=gain, golden=dict(enumerate(golden)), tasks=by_name).verdict


def test_the_verdict():
    assert "nothing to teach" in verdict(gain=0.05) and "nothing to teach" in verdict(same=4)
    assert "only you can see" in verdict()
    assert verdict(golden=[1.0, 2.0]) == "This teacher can teach: the context makes the golden responses likelier."
    assert "not from the context of row 1, 3" in verdict(golden=[1.5, 0.05, 1.2, -0.3])
    assert "does not teach the golden responses" in verdict(golden=[0.0, -1.0])


def test_the_verdict_uses_the_tasks():
    said = verdict(tasks=[(0.0, 1.0), (0.5, 0.5), (1.0, 1.0)])
    assert said == (
        "This teacher answers otherwise with the context. It answers t0 better with the context than without, and can "
        "teach that. It answers t1 no better with the context, and cannot teach that."
    )
    assert "only you can see" in verdict(tasks=[(1.0, 1.0)])  # nothing that the context could help with
    said = verdict(golden=[1.0], tasks=[(0.5, 0.25)])
    assert said.endswith("likelier. It answers t0 no better with the context, and cannot teach that.")
    assert "nothing to teach" in verdict(gain=0.0, tasks=[(0.0, 1.0)])


@pytest.fixture
def look(tmp_path):
    """The check of demo rows with the given contexts, on the demo model."""

    def run(contexts, golden=True, tasks=()):
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
        flags += ["--eval_tasks", *map(str, tasks)] if tasks else []
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


def test_tasks_are_asked_without_and_with_their_contexts(look, tmp_path):
    facts = world.new_facts()[4:8]
    rows = [{"prompt": world.user(f.said(f.relation.held_out_wordings[0])), "answer": f.value} for f in facts]
    told = [row | {"privileged_context": f.said(f.relation.demonstration)} for row, f in zip(rows, facts, strict=True)]
    # The teacher's prompt of a row's own counts as well, and a row without a context is left out.
    own = told[0]["prompt"][0]["content"] + "\n\n" + told[0]["privileged_context"]
    mixed = [rows[0] | {"teacher_prompt": own}, *told[1:], rows[0] | {"answer": "unknown"}]
    elsewhere = [row | {"privileged_context": "The pet of Uwe is the dog."} for row in rows]
    tasks = []
    for name, each in {"told": mixed, "elsewhere": elsewhere, "plain": rows}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
        tasks.append(f"{tmp_path / name}.jsonl:contains")
    *_, first, second, said = look([None] * 3, golden=False, tasks=tasks)
    assert first == "Task told, 4 rows with a context: 0.00 of them are answered right without it, 1.00 with it."
    assert second.startswith("Task elsewhere, 4 rows with a context: 0.00 ") and second.endswith(" 0.00 with it.")
    assert "It answers told better" in said and "It answers elsewhere no better" in said and "plain" not in said
    (tmp_path / "told.jsonl").write_text(
        json.dumps(rows[0]) + "\n" + json.dumps(told[1] | {"privileged_context": "word " * 600})
    )
    with pytest.raises(ValueError, match="Task told: Row 1 has .* tokens"):
        look([None], golden=False, tasks=tasks)


def test_a_gain_below_0_is_said_in_words():
    assert "0.5 nats per token less likely than without" in TeacherCheck(4, 0, -0.5, {}).lines[0]


def test_a_new_run_says_so_before_its_first_step(tmp_path, capsys):
    """With the demo's rows and the template that its model knows; a resume does not ask again."""
    facts = world.new_facts()[:6]
    rows = [
        {"prompt": f.said(f.relation.trained_wordings[0]), "privileged_context": f.said(f.relation.demonstration)}
        for f in facts
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(MODEL_DIR), "--dataset", str(tmp_path / "rows.jsonl"), "--bf16", "false", "--batch_size",
             "2", "--max_completion_length", "14", "--output_dir", str(tmp_path / "run"), "--save_steps", "1",
             "--report_to", "none", "--recipe", "trl", "--num_generations", "2"]  # fmt: skip
    train.main([*flags, "--max_steps", "1"])
    said = capsys.readouterr().out
    assert "the teacher's answers to 4 rows before the first step" in said and "another one in 4 of them" in said
    assert "Row 0 is answered 'I do not know.' without its context, and 'Mira lives in" in said
    train.main([*flags, "--max_steps", "2", "--resume_from_checkpoint", "true"])
    assert "Teacher check" not in capsys.readouterr().out
    train.main([*flags, "--max_steps", "1", "--output_dir", str(tmp_path / "other"), "--teacher_check_rows", "0"])
    assert "Teacher check" not in capsys.readouterr().out


def test_the_teachers_answers_are_its_own():
    """An adapter that was trained before is not part of a base teacher: equal prompts have different answers."""
    trainer = make_trainer(lora=True, teacher_model_kind="base")
    for name, param in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.5)
    prompt = world.user("Why?")
    found = check(trainer, {0: {"prompt": prompt, "teacher_prompt": prompt}}, {})
    assert found.same == 0 and found.gain > 0.1
    assert check(make_trainer(), {0: {"prompt": prompt, "teacher_prompt": prompt}}, {}).same == 1
