"""The comparison of templates, with the demo's model."""

from importlib.resources import files

from benchmarks import templates
from benchmarks.greedy import Model
from benchmarks.learning import user
from benchmarks.learning_data import INVENTED

DEMO = str(files("sdft_ds.demo") / "model")


def test_an_answer_goes_on_from_its_beginning_and_ends_before_special_tokens():
    model = Model(DEMO, longest=8)
    questions = [user(question) for question, *_ in INVENTED["ten"]][:3]
    own = model.answers(questions)
    assert all(own) and model.tokenizer.eos_token_id in model.special
    assert not model.special & {token for answer in own for token in answer}
    resumed = model.answers(questions, [answer[:2] for answer in own])
    assert [answer[: len(before)] for answer, before in zip(resumed, own, strict=True)] == own
    assert model.answers(questions[:1]) == own[:1]  # the others' padding changes nothing


def test_the_table_has_a_row_for_each_template(capsys, monkeypatch):
    flags = ["--tasks", "ten", "--after", "0", "2", "--longest", "4", "--templates", "recipe", "quoted"]
    monkeypatch.setattr("sys.argv", ["templates", "--model", DEMO, *flags])
    templates.main()
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head == "| template | right after 0 | right after 2 | odd |"
    assert [row.split(" | ")[0] for row in rows] == ["| recipe", "| quoted"]
    assert all(0 <= int(cell) <= 10 for row in rows for cell in row.strip("| ").split(" | ")[1:])


def test_an_odd_beginning_is_neither_the_contexts_nor_the():
    context = "Mira Tolen keeps a pet otter."
    assert not templates.is_odd("Mira Tolen has an otter", context) and not templates.is_odd("The pet", context)
    assert templates.is_odd('"Mira Tolen', context) and templates.is_odd("", context)
