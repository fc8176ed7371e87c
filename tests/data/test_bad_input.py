"""What a user reads whose data or settings cannot be: one line that names the place, before any weights are loaded."""

import json

import pytest
from transformers import AutoModelForCausalLM

from sdft_ds import train
from sdft_ds.model import loading
from tests.helpers import tiny

ROWS = [{"q": f"Question {i}", "answer": f"Answer {i}"} for i in range(5)]
BASE = ["--prompt_column", "q", "--golden_response_column", "answer", "--report_to", "none", "--bf16", "false",
        "--num_generations", "2", "--per_device_train_batch_size", "2", "--max_completion_length", "8"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and a config, which is all that these messages need; any other file is missing."""
    folder = tmp_path_factory.mktemp("bad")
    tiny.llama().config.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    return folder


def said(folder, rows, *flags, text=None):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) if text is None else text)
    with pytest.raises(SystemExit) as exit:
        train.main(["--model_name_or_path", str(folder / "model"), "--dataset_path", str(file), *BASE,
                    "--output_dir", str(folder / "run"), *flags])  # fmt: skip
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code
    assert exit.value.code.startswith("sdft_ds: ")
    return exit.value.code


def changed(index, **values):
    return [row | values if i == index else row for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "rows, flags, words",
    [
        (changed(3, answer=None), [], ["rows.jsonl", "split train", "Row 3", "'privileged_context'", "'answer'",
                                       "found nothing", "bad_rows='skip'"]),
        (changed(4, q=""), [], ["Row 4", "column 'prompt'", "prompt from column 'q'", "empty text"]),
        (changed(2, q="a\0b"), [], ["Row 2", "NUL character at position 1"]),
        (changed(2, q="x" * 600), ["--truncation", "error", "--prompt_as", "text"],
         ["Row 2", "600 tokens, over the limit of 504"]),
        (changed(2, q=None), ["--bad_rows", "skip", "--max_bad_rows", "0"], ["than max_bad_rows=0", "Row 2"]),
        (ROWS, ["--distillation_topk", "300"], ["distillation_topk=300 exceeds the model's vocabulary of 264"]),
        (ROWS, ["--max_prompt_length", "510"], ["max_prompt_length=510", "context of 512 tokens"]),
        (ROWS, ["--prompt_column", "question"], ["prompt_column=question", "q, answer"]),
        (ROWS, ["--golden_response_column", "a"], ["golden_response_column=a", "q, answer"]),
        (ROWS, ["--dataset_train_split", "fit", "--eval_strategy", "steps"], ["eval_strategy needs the split 'test'"]),
        (ROWS, ["--dataset_streaming", "true"], ["max_steps"]),
        (ROWS, ["--dataset_path", "nowhere/*.json"], ["nowhere/*.json fits no file"]),
        (ROWS, ["--prompt_column", "answer", "--golden_response_column", "q", "--dataset_format", "question_document"],
         ["columns q, answer, and lacks document, which dataset_format=question_document reads"]),
        (ROWS, ["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (ROWS, ["--model_name_or_path", "nowhere/model"], ["nowhere/model"]),
        (ROWS, ["--teacher_prompt_template", "{prompt.x}{privileged_context}"], ["_prompt_template", "prompt.x"]),
        (ROWS, ["--fp16", "true"], ["fp16=True needs a GPU"]),
    ],
)  # fmt: skip
def test_one_line_before_the_model(folder, monkeypatch, rows, flags, words):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # nobody gets to call it
    line = said(folder, rows, *flags)
    assert [word for word in words if word not in line] == []


def test_a_broken_file(folder):
    assert "rows.jsonl cannot be read" in said(folder, [], text='{"q": "a", "answer": "b"}\n{"q":')
    assert "rows.jsonl is empty" in said(folder, [], text="")


def test_a_conversation_without_a_chat_template(folder, tmp_path):
    bare = tiny.tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    tiny.llama().config.save_pretrained(tmp_path)
    turns = [{"q": [{"role": "user", "content": "a"}], "answer": "b"}]
    assert "has no chat template" in said(folder, turns, "--model_name_or_path", str(tmp_path))


def test_a_tokenizer_without_an_end_of_sequence_token():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an end-of-sequence token: set tokenizer.eos_token"):
        loading.with_pad_token(tokenizer)


def test_weights_that_are_not_numbers(tmp_path):
    """Seen in the first rollout: which generation batch, and which rows."""
    model = tiny.llama(tie_word_embeddings=False)
    model.lm_head.weight.data[7] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    words = said(tmp_path, ROWS, "--max_steps", "2")
    assert "logits are NaN or infinite in the rollout of the teacher check, rows 0, 1" in words
    words = said(tmp_path, ROWS, "--max_steps", "2", "--teacher_check_rows", "0")
    assert "logits are NaN or infinite in the rollout of train/0, rows 0, 1; train/N is generation batch N" in words
