import pytest
import yaml
from transformers import TrainerState, TrainingArguments

from sdft_ds.cli.arguments import parse
from sdft_ds.cli.yaml_config import FILE, SavedSettings
from sdft_ds.demo.run import RECIPE

OWN = ["--model_name_or_path", "m", "--dataset_path", "a.jsonl", "b.jsonl", "--report_to", "none"]
CASES = {
    "the demo": [],
    "the defaults": OWN,
    "supervised": [*OWN, "--method", "sft", "--gradient_accumulation_steps", "2"],
    "a recipe": [*OWN, "--recipe", "paper", "--learning_rate", "1e-5"],
    "many": [
        *OWN, "--dataset_format", "messages_output_text", "--eval_fraction", "0.1", "--eval_strategy", "steps",
        "--eval_steps", "5", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--distillation_topk", "none",
        "--distillation_alpha", "1", "--gradient_accumulation_steps", "4", "--generation_batch_size", "64",
        "--generation_kwargs", '{"typical_p": 0.9}', "--chat_template_kwargs", '{"enable_thinking": false}',
        "--teacher_chat_template_kwargs", '{"enable_thinking": true}',
        "--teacher_model_kind", "ema", "--teacher_update_rate", "0.01", "--teacher_prompt_template",
        "--- {prompt}: \n{{ü}} # {privileged_context}", "--max_prompt_length", "none", "--bf16", "false",
        "--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": 1}', "--save_strategy", "no",
        "--eval_tasks", "x=a.jsonl:contains", "--bad_rows", "skip", "--optim_args", "a=b",
    ],
}  # fmt: skip


def start(settings, folder):
    settings.on_train_begin(TrainingArguments(output_dir=str(folder)), TrainerState(), None)


@pytest.mark.parametrize("argv", CASES.values(), ids=CASES.keys())
def test_what_is_saved_is_read_again_and_makes_the_same_run(tmp_path, argv):
    first = SavedSettings(parse(argv, RECIPE))
    start(first, tmp_path)
    again = SavedSettings(parse(["--config", str(tmp_path / FILE)], RECIPE))
    assert again.all == first.all and set(first.given) <= set(again.given)
    assert parse(["--config", str(tmp_path / FILE), "--max_steps", "7"], RECIPE)[1].max_steps == 7


def test_what_is_told_is_what_was_given(tmp_path):
    """Not what a recipe sets; of a file what differs from the defaults there, however much it lists."""
    typed = [*OWN, "--learning_rate=3e-4", "--seed", "42", "--local_rank=0"]
    first = SavedSettings(parse(typed, RECIPE))
    told = yaml.safe_load("\n".join(first.given))
    assert told == {
        "model_name_or_path": "m", "dataset_path": ["a.jsonl", "b.jsonl"], "report_to": [], "learning_rate": 3e-4,
        "seed": 42,
    }  # fmt: skip
    start(first, tmp_path)
    again = SavedSettings(parse(["--config", str(tmp_path / FILE), "--max_steps", "7"], RECIPE))
    told = yaml.safe_load("\n".join(again.given))
    assert told["max_steps"] == 7 and told["learning_rate"] == 3e-4 and "seed" not in told
    assert all(line.count("\n") == 0 for line in again.given)


def test_no_token_is_told_or_saved(tmp_path):
    settings = SavedSettings(parse([*OWN, "--hub_token", "hf_secret123"], RECIPE))
    start(settings, tmp_path)
    assert "hf_secret123" not in (tmp_path / FILE).read_text() + str(settings.given)


def test_the_number_of_ranks_may_be_another(tmp_path):
    """The size of a generation batch follows from the number of ranks, and is not saved."""
    start(SavedSettings(parse([*OWN, "--generation_batch_size", "16"], RECIPE)), tmp_path)
    saved = yaml.safe_load((tmp_path / FILE).read_text())
    assert saved["steps_per_generation"] == 2 and "generation_batch_size" not in saved
