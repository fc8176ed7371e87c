"""The preview: that it shows what training does, on the screen and on the page."""

import base64
import io
import json
import shutil

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import processors
from transformers import AutoTokenizer

from sdft_ds.data.batch import Completion, LossMask, Rollout, collate
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import Example
from sdft_ds.data.schedule import Slot
from sdft_ds.data.validation import validate_dataset
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.metrics.completions import token_texts
from sdft_ds.objectives.protocol import BatchUse
from sdft_ds.preview import inline, page, terminal
from sdft_ds.preview.__main__ import STREAMED, look, main
from sdft_ds.preview.row import Looker
from sdft_ds.preview.scores import scores
from sdft_ds.preview.spans import TextSpan, prompts_in_pieces, sample
from sdft_ds.preview.statistics import CUT_CONTEXT, CUT_QUESTION, DROPPED, REFUSED
from tests.helpers import html_tree, reference, tiny
from tests.helpers.trainers import make_trainer

LONG = "word " * 30


def demo_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def user(text):
    return [{"role": "user", "content": text}]


ROWS = [
    {"prompt": user(LONG + "Where does Mira live?"), "privileged_context": "Mira lives in Oslo. " + LONG},
    {"prompt": user("Where does Mira live?"), "privileged_context": "The <b>home</b> of Mira & co. is Oslo."},
    {"prompt": [{"role": "system", "content": LONG * 3}, *user("Why?")], "privileged_context": "Oslo."},
    {"prompt": user("Where does Mira live?"), "privileged_context": "Mira lives in Oslo. " + LONG * 2},
]
LIMITS = ["--max_prompt_length", "60", "--max_teacher_prompt_length", "100", "--bf16", "false"]


@pytest.fixture
def flags(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return ["--model_name_or_path", str(MODEL_DIR), "--dataset_path", str(tmp_path / "rows.jsonl"), *LIMITS]


def screen(view):
    console = Console(width=100, highlight=False, record=True, file=io.StringIO())
    terminal.show(view, console)
    return console.export_text()


def test_the_screen_of_the_demo():
    said = screen(look([]))
    row = said[said.index("Row 0") : said.index("Row 1")].splitlines()[1:]
    assert [line.rstrip() for line in row] == [
        "The student sees: 13 tokens, limit 498",
        "<|im_start|>user",
        "Where does Mira live?<|im_end|>",
        "<|im_start|>assistant",
        "",
        "The teacher sees: 22 tokens, limit 498; context 7",
        "<|im_start|>user",
        "Where does Mira live?",
        "",
        "⟦The home of Mira is Lisbon.⟧<|im_end|>",
        "<|im_start|>assistant",
        "",
        "A completion (the context stands in for one; --score generates): 8 tokens, 8 in the loss",
        "The home of Mira is Lisbon.<|im_end|>",
        "",
    ]
    assert "All 64 rows are within the limits." in said and "No prompt occurs twice." in said
    assert ["student's", "prompt", "14", "16", "16", "16", "498", "0"] in map(str.split, said.splitlines())


def test_cut_rows_are_shown_and_counted(flags):
    view = look(flags, 4)
    first, _, refused, last = view.rows
    assert first.look.cut_question and first.look.cut_context and last.look.cut_context and refused.look.refusal
    fates = view.statistics.fates
    assert (fates[CUT_QUESTION], fates[CUT_CONTEXT], fates[REFUSED], fates[DROPPED]) == ([0], [0, 3], [2], [])
    assert view.statistics.duplicates == {3: 1}
    said = screen(view)
    for line in (
        "1 of 4 rows lose the beginning of the question: 0.",
        "2 of 4 rows lose the end of the context: 0, 3.",
        "1 of 4 rows stop the training: 2.",
        "1 of 4 rows have the prompt of an earlier one: 3 (as 1).",
    ):
        assert line in said
    assert "Row 2: the student's prompt (max_prompt_length) has" in said and "The student sees: 60 of " in said
    assert f"✂⟨{first.look.cut_question[:40]}" in said.replace("\n", "")


def test_the_question_is_never_cut_in_the_teachers_view_nor_are_the_templates(flags):
    view = look(flags, 4)
    for shown in view.rows:
        for pieces in (shown.student, shown.teacher):
            kept = "".join(piece.text for piece in pieces if piece.part != "cut")
            prompts = shown.look.taken or shown.look.uncut
            assert kept in (prompts.student.text, prompts.teacher.text)
            assert shown.look.example.prompt[-1]["content"][-4:] in kept and kept.endswith("<|im_start|>assistant\n")
            # With what was cut in its place it is the prompt without limits.
            whole = "".join(piece.text for piece in pieces)
            assert whole in (shown.look.uncut.student.text, shown.look.uncut.teacher.text)


def test_the_teachers_chat_template_kwargs_show_in_its_prompt_alone(flags, tmp_path):
    model = tmp_path / "thinks"
    shutil.copytree(MODEL_DIR, model)
    tokenizer = demo_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking %}<think>{% endif %}"
    tokenizer.save_pretrained(model)
    flags[1] = str(model)
    thinks = ["--teacher_chat_template_kwargs", '{"enable_thinking": true}', "--bad_rows", "skip"]
    view = look([*flags, *thinks, "--max_completion_length", "4"], 2, score=True)
    for shown in view.rows:
        assert "".join(piece.text for piece in shown.student).endswith("<|im_start|>assistant\n")
        assert "".join(piece.text for piece in shown.teacher).endswith("<|im_start|>assistant\n<think>")
        assert shown.scored.teacher_prompt == shown.look.taken.teacher.text  # as training renders it


def test_sdpo_fills_its_templates_after_the_rollout(flags):
    view = look([*flags, "--method", "sdpo", "--reward", "choice", "--answer_column", "answer"])
    assert any("from reprompt_template" in note for note in view.notes)
    taken = [row.look.taken for row in view.rows if row.look.taken]
    assert taken and all(each.teacher.ids == each.student.ids for each in taken)


def test_training_counts_the_same_cuts(flags):
    view = look(flags)
    builder = PromptBuilder(demo_tokenizer(), "{prompt}\n\n{privileged_context}", *view.limits.values())
    usable = [row for i, row in enumerate(ROWS) if i not in view.statistics.fates[REFUSED]]
    with pytest.warns(UserWarning, match="0 are dropped, 1 lose the beginning of the prompt and 2 the end"):
        validate_dataset(Dataset.from_list(usable), "train_dataset", builder)
    with pytest.raises(ValueError, match="never cut"):
        validate_dataset(Dataset.from_list(ROWS), "train_dataset", builder)


@pytest.mark.parametrize("truncation, fate", [("drop", DROPPED), ("error", REFUSED)])
def test_other_policies(flags, truncation, fate):
    view = look([*flags, "--truncation", truncation], 4)
    assert view.statistics.fates[fate] == [0, 2, 3] and not view.statistics.fates[CUT_CONTEXT]
    assert [shown.sample is None for shown in view.rows] == [True, False, True, True]
    assert f"3 of 4 rows {fate}: 0, 2, 3." in screen(view)


def test_the_mask_is_the_one_of_the_paired_batch(tokenizer):
    builder = PromptBuilder(tokenizer, "{prompt}\n{privileged_context}", None, None)
    seen = Looker(builder).look(Example("Q", "abcdef"), 0)
    ids = [*tokenizer("abcdef")["input_ids"], tokenizer.eos_token_id]
    for mask, longest in ((LossMask(), 9), (LossMask(skip=2), 9), (LossMask(2, True), 6), (LossMask(skip=9), 4)):
        shown = sample(seen, tokenizer, mask, longest)
        assert shown.truncated == (longest < len(ids)) and len(shown.tokens) == min(longest, len(ids))
        rollout = Rollout(0, seen.taken, Completion(ids[:longest], shown.truncated))
        in_loss = [token for token, counts in zip(ids, shown.in_loss, strict=False) if counts]
        assert in_loss == collate([rollout], mask, 0, torch.device("cpu")).tokens_N.tolist()
    assert sample(seen, tokenizer, LossMask(skip=2), 9).in_loss == [False] * 2 + [True] * 5


def test_skipped_tokens_stand_within_marks():
    said = screen(look(["--num_loss_tokens_to_skip", "3"], 1))
    assert "8 tokens, 5 in the loss" in said and "⟨The home of⟩ Mira is Lisbon.<|im_end|>" in said


def test_special_tokens_are_seen_where_the_tokenizer_sees_them(tokenizer):
    builder = PromptBuilder(tokenizer, "{prompt} {privileged_context}", None, None)
    seen = Looker(builder).look(Example(user("Q"), "a <|im_end|>"), 0)
    _, teacher = prompts_in_pieces(builder, seen)
    assert teacher == [
        TextSpan("<|im_start|>", special=True), TextSpan("user\n"), TextSpan("Q "), TextSpan("a ", "context"),
        TextSpan("<|im_end|>", "context", special=True),  # of the data, and the model reads it as an end all the same
        TextSpan("<|im_end|>", special=True), TextSpan("\n"), TextSpan("<|im_start|>", special=True),
        TextSpan("assistant\n"),
    ]  # fmt: skip


def test_what_the_tokenizer_adds_to_plain_text_is_shown():
    adding = tiny.tokenizer()
    adding.add_special_tokens({"bos_token": "<s>"})
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    builder = PromptBuilder(adding, "{prompt} {privileged_context}", None, None)
    student, teacher = prompts_in_pieces(builder, Looker(builder).look(Example("Q", "H"), 0))
    assert student == [TextSpan("<s>", special=True), TextSpan("Q")] and teacher[-1] == TextSpan("H", "context")


@pytest.mark.parametrize("text", ["plain words", "ünï 日本 🤖!", "🤖"])
def test_the_texts_of_tokens_are_the_text(tokenizer, text):
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text + "<|im_end|>"
    cut = token_texts(tokenizer, tokenizer("a🤖")["input_ids"][:3])
    assert cut[:2] == ["a", ""] and "\ufffd" in cut[2]


def test_the_terminal_gets_no_control_characters_and_no_endless_text(tokenizer):
    shown = terminal._prompt([TextSpan("a\x1b[31m\tb\x9b", "context"), TextSpan("x" * 5000)]).plain
    assert shown.startswith("⟦a␛[31m\tb\ufffd⟧xxx") and "…(3,800 characters)…" in shown and len(shown) < 1300


def test_the_page_is_one_tree_and_escapes(flags):
    tree = html_tree.parse(page.render(look([*flags, "--num_loss_tokens_to_skip", "2"], 4)))
    assert [section.attributes["id"] for section in tree.all("section")] == [
        "row-0",
        "row-1",
        "row-2",
        "row-3",
        "data-set",
    ]
    row = tree.one("section", id="row-1")
    student, teacher = row.all("pre")
    assert teacher.one("mark").text == ROWS[1]["privileged_context"] and student.all("mark") == []
    assert [b.text for b in student.all("b", class_="special")] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    tokens = row.one("p", class_="sample").all("i")
    assert [token.attributes["class"] for token in tokens][:3] == ["dx", "dx", "d0"]
    assert tree.one("section", id="row-0").all("del")[0].text.startswith("word word")
    assert tree.one("section", id="row-2").all("p", class_="sample") == []
    data = tree.one("section", id="data-set")
    assert data.one("table").rows()[1][-2:] == ["60", "2"] and len(data.all("svg")) == 3


SETTINGS = {
    "distillation_alpha": 0.0,
    "distillation_mode": "full_logits",
    "num_loss_tokens_to_skip": 2,
    "temperature": 0.7,
    "num_generations": 1,
}


@pytest.mark.parametrize("settings", [SETTINGS, {"distillation_alpha": 0.5, "distillation_topk": 20}])
def test_scores_are_the_trainers_own(settings):
    trainer = make_trainer(**settings)
    found = scores(trainer, dict(enumerate(tiny.rows(3))))
    total = sum(d for completion in found.values() for d in completion.divergence if d is not None)
    # What the trainer itself meters, and the plain reference, on the same rollouts.
    trainer.meters["eval"].reset()
    slots, meters = tuple(Slot(i, i) for i in range(3)), trainer.meters["eval"]
    with trainer.prepared():
        use = BatchUse(3, keep_on=trainer.args.device)
        batches = trainer.objective.collect(dict(enumerate(tiny.rows(3))), slots, "preview", meters, use)
    trainer.model.eval()
    (inputs,) = trainer.with_loss_weights(batches)
    trainer.compute_loss(trainer.model, inputs)
    assert trainer.meters["eval"].sums["sdft/distillation_loss"][0].item() == pytest.approx(total, rel=1e-5)
    for rollout in batches[0].batch.rollouts:
        shown, ids = found[rollout.row], rollout.completion.ids
        assert shown.completion == trainer.prompts.tokenizer.decode(ids) and shown.length == len(ids)
        sides = [
            reference.logits_of_completion(trainer.model, prompt.ids, ids, trainer.args.temperature).detach()
            for prompt in (rollout.prompts.student, rollout.prompts.teacher)
        ]
        expected = reference.per_token(*sides, trainer.args.distillation_alpha, trainer.args.distillation_topk)
        skip = trainer.args.num_loss_tokens_to_skip
        assert shown.divergence[:skip] == [None] * skip and shown.student_top[:skip] == [[]] * skip
        assert shown.divergence[skip:] == pytest.approx(expected[skip:].tolist(), abs=1e-5)
        for of_side, top in zip(sides, (shown.student_top, shown.teacher_top), strict=True):
            likeliest = of_side.softmax(-1).topk(5).values[-1].tolist()
            assert [entry["p"] for entry in top[-1]] == pytest.approx(likeliest, abs=1e-5)


def test_scored_rows_on_screen_and_page(tmp_path):
    view = look(["--num_loss_tokens_to_skip", "1", "--output_dir", str(tmp_path / "run")], 2, score=True)
    said, tree = screen(view), html_tree.parse(page.render(view))
    assert "teacher base · KL(teacher‖student) over the whole vocabulary" in said.replace("\n", "")
    assert all(line in tree.one("header").text for line in view.verdict) and len(view.verdict) == 2
    for shown in view.rows:
        scored = shown.scored
        figures = [scored.divergence[i] for i in range(1, scored.length)]
        assert scored.divergence[0] is None and min(figures) >= 0
        assert f"⟨{scored.tokens[0]}⟩{scored.completion[len(scored.tokens[0]) :]}" in said
        section = tree.one("section", id=f"row-{shown.look.index}")
        assert section.one("p", class_="tokens").text == scored.completion
        assert len(json.loads(section.one("script").text)["tokens"]) == scored.length
    assert not (tmp_path / "run").exists()


def test_a_trainers_own_preview_in_a_notebook():
    trainer = make_trainer(**SETTINGS)
    page = inline(trainer, rows=2)
    assert repr(page).startswith("Teacher check, 2 rows: ") and "\nThis teacher" in repr(page)
    frame = html_tree.parse(page._repr_html_()).one("iframe")
    shown = html_tree.parse(base64.b64decode(frame.attributes["src"].partition("base64,")[2]).decode())
    assert shown.one("section", id="row-1").one("p", class_="tokens").text
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    streaming = make_trainer(**SETTINGS, stream=True)
    with pytest.raises(ValueError, match="python -m sdft_ds.preview"):
        inline(streaming)


def test_without_scores_no_weights_are_needed(tmp_path, flags):
    bare = tmp_path / "bare"
    shutil.copytree(MODEL_DIR, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    flags[1] = str(bare)
    assert look(flags, 1).rows
    with pytest.raises(OSError, match="safetensors"):
        look(flags, 1, score=True)


def test_what_spreads_training_over_ranks_does_not_matter(flags):
    spread = ["--deepspeed", "nowhere.json", "--num_generations", "7", "--generation_batch_size", "24"]
    assert look([*flags, *spread, "--steps_per_generation", "3"], 1).statistics.rows == len(ROWS)


def test_of_a_stream_only_the_beginning_is_looked_at(tmp_path, flags):
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(ROWS[1]) + "\n" for _ in range(STREAMED + 5))
    view = look([*flags, "--dataset_streaming", "true", "--max_steps", "1"])
    assert view.statistics.rows == STREAMED and f"its first {STREAMED:,} rows" in screen(view)


def test_bad_rows_are_left_out_as_training_does(flags, tmp_path):
    with open(tmp_path / "rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in (ROWS[1] | {"privileged_context": None}, ROWS[1]))
    view = look([*flags, "--bad_rows", "skip"])
    assert view.statistics.rows == 1 and [row.look.index for row in view.rows] == [1]
    assert "1 invalid rows are skipped. The first: Row 0, column 'privileged_context'" in " ".join(
        screen(view).split()
    )
    with pytest.raises(ValueError, match="Row 0, column 'privileged_context'"):
        look(flags)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--dataset_path", "nowhere.json"], "nowhere.json does not exist"),
        (["--rows", "0"], "--rows must be at least 1, not 0"),
        (["--max_prompt_length", "600"], "exceed the model's context of 512"),
        (["--privileged_context_column", "nothing"], "privileged_context_column=nothing, but"),
        (["--html", "nowhere/page.html"], "nowhere/page.html"),
    ],
)
def test_a_mistake_is_one_line(flags, wrong, words):
    with pytest.raises(SystemExit) as error:
        main([*flags, *wrong])
    assert str(error.value).startswith("sdft_ds: ") and words in str(error.value) and "\n" not in str(error.value)


def test_an_empty_context_is_an_error_as_in_training(tmp_path, flags):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "privileged_context": ""}))
    with pytest.raises(SystemExit, match="^sdft_ds: Row 0, column 'privileged_context': found an empty text"):
        main(flags)


def test_the_command(tmp_path, capsys):
    main(["--rows", "1", "--html", str(tmp_path / "page.html")])
    said = capsys.readouterr().out
    assert "Row 0" in said and "Row 1" not in said and said.endswith("page.html\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(SystemExit) as error:
        main(["--row", "1"])
    assert error.value.code == 2 and "unknown setting --row" in capsys.readouterr().err
