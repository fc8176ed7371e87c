import sys

import pytest
from peft import LoraConfig

from sdft_ds import SFTConfig
from sdft_ds.cli.summary import closing, opening, resume_command
from tests.helpers.trainers import make_trainer

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
DEEPSPEED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
SCRIPT = ["/venv/bin/python", "-u", "launch/train.py"]
LORA = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"teacher_model_kind": "base", "distillation_alpha": 0.0, "distillation_mode": "full_logits",
             "gradient_accumulation_steps": 2},
            "all 27 k weights · teacher base (its weights at the start) · forward KL, full vocabulary · fp32 · "
            "6 rows, 2 a step with 2 answers each, 3 steps an epoch, 3 steps in all",
        ),
        (
            {"peft_config": LORA, "bf16": True, "num_generations": 1, "max_steps": -1, "num_train_epochs": 2.0,
             "distillation_alpha": 1.0, "distillation_topk": 5, "distillation_add_tail": True},
            "LoRA on 14 modules, 4.1 k of 31.1 k weights · teacher base (adapter off) · reverse KL, top 5 and the "
            "tail · bf16 · 6 rows, 2 a step, 3 steps an epoch, 6 steps in all",
        ),
        (
            {"stage": 2, "teacher_model_kind": "ema", "teacher_update_rate": 0.05, "teacher_sync_steps": 1,
             "stream": True, "num_generations": 1},
            "teacher ema (rate 0.05 every step) · Jensen-Shannon with alpha 0.5, top 100 · fp32, ZeRO-2 · 2 a step, "
            "3 steps in all",
        ),
        ({"config": SFTConfig}, "all 27 k weights · SFT · fp32 · 6 rows, 2 a step"),
    ],
    ids=["all weights", "LoRA", "a stream under ZeRO-2", "supervised"],
)  # fmt: skip
def test_the_first_line_says_what_was_chosen(settings, words):
    assert words in opening(make_trainer(**settings))


@pytest.mark.parametrize(
    "argv, environment, command",
    [
        (["python", "-m", "sdft_ds.train"], {}, "python -m sdft_ds.train --output_dir 'a b'"),
        (SCRIPT, TORCHRUN, "torchrun --nproc_per_node 2 launch/train.py --output_dir 'a b'"),
        ([*SCRIPT, "--local_rank=0"], DEEPSPEED, "deepspeed --num_gpus 2 launch/train.py --output_dir 'a b'"),
        (SCRIPT, TORCHRUN | {"GROUP_WORLD_SIZE": "2"}, "the same command with"),
        (SCRIPT, {"RANK": "3", "WORLD_SIZE": "4"}, "the same command with"),
    ],
    ids=["python", "torchrun", "deepspeed", "torchrun on two nodes", "srun"],
)
def test_the_command_that_goes_on(monkeypatch, argv, environment, command):
    own = [flag for flag in argv if flag.startswith("--")]
    program = argv[: len(argv) - len(own)]
    flags = [*own, "--resume_from_checkpoint", "old", "--output_dir", "a b"]
    monkeypatch.setattr(sys, "orig_argv", [*program, *flags])
    monkeypatch.setattr(sys, "argv", ["", *flags])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")  # an environment in the working folder has its path
    assert resume_command(environment) == f"{command} --resume_from_checkpoint true"


@pytest.mark.parametrize("resume", [["--resume_from_checkpoint"], ["--resume-from-checkpoint=true"], []])
def test_a_resume_without_a_value_takes_no_other_flag_along(monkeypatch, resume):
    flags = ["--dataset", "d.jsonl", *resume, "--lr", "1e-4", "--use_peft"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *flags])
    monkeypatch.setattr(sys, "argv", ["", *flags])
    kept = "python train.py --dataset d.jsonl --lr 1e-4 --use_peft"
    assert resume_command({}) == f"{kept} --resume_from_checkpoint true"


def test_a_program_that_replaced_its_arguments_is_told_to_call_again(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "notebook.py"])
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m", "--dataset", "d.jsonl"])
    assert resume_command({}) == "the same call with --resume_from_checkpoint true"


def test_the_end_says_what_is_known_and_how_to_go_on(tmp_path):
    """As on the page; without questions it says how to ask them."""

    trainer = make_trainer(output_dir=str(tmp_path), peft_config=LORA)
    trainer.train()
    said = closing(str(tmp_path), trainer.prompts.tokenizer, is_adapter=True)
    assert "Whether its answers are right was not asked" in said and f"Saved to {tmp_path}" in said
    assert "The distance to the teacher" in said and f"Report: {tmp_path / 'report.html'}" in said
    assert f"python -m sdft_ds.evaluate {tmp_path} --eval_tasks FILE" in said
    assert f"python -m sdft_ds.merge {tmp_path} {tmp_path}-merged" in said
    page = (tmp_path / "report.html").read_text()
    assert "Whether its answers are right was not asked" in page
