"""The demo run, used if neither a model nor a data set is given: teaches the embedded model new facts.

The recipe, the evaluation before and after, two baselines on the same rows (self-distillation without anchors, and
supervised fine-tuning), and the final table.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.checkpoint.preemption import INTERRUPTED
from sdft_ds.config.inherited import COUNTS_OF_PROCESSES
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.demo.evaluate import MAX_NEW_TOKENS
from sdft_ds.demo.world import anchor_rows, answer_accuracies, questions, train_rows
from sdft_ds.distributed import ranks
from sdft_ds.evaluation.task_evaluation import write_figures
from sdft_ds.files import atomic_write
from sdft_ds.trainer import TRAINERS, MethodTrainer

# Tuned by hand: for seeds 0 to 4, accuracy on new facts reaches 1.00 in every wording and stays 1.00 on old ones.
# The baselines have the same rows, batch, learning rate and number of steps. Supervised fine-tuning learns the new
# facts in the trained wordings but not in others, and forgets old ones. Command line flags override the recipe.
RECIPE: dict[str, Any] = {
    "output_dir": "runs/demo",
    "teacher_model_kind": "base",
    "distillation_alpha": 0.0,
    "distillation_mode": "full_logits",
    "num_generations": 1,
    "per_device_train_batch_size": 16,
    "max_completion_length": MAX_NEW_TOKENS,
    "max_steps": 120,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "bf16": False,  # no gain for a model of 0.8 M parameters
    "activation_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
}

MEANING = {
    "new_trained": "new facts, questions as trained",
    "new_held_out": "new facts, other wordings",
    "new_with_context": "new facts, given in the prompt (the teacher's view)",
    "old": "old facts",
    "unknown": 'unknown people: "I do not know."',
}
# What the student is asked without a context, by shorter names.
TASKS = {
    "new_trained": "new facts",
    "new_held_out": "new facts in other wordings",
    "old": "old facts",
    "unknown": "unknown people",
}
WITHOUT_ANCHORS = "sdft_without_anchors"
COLUMNS = {"sdft": "SDFT", WITHOUT_ANCHORS: "SDFT without anchors", "sft": "SFT"}
# Column -> the flags of its run.
BASELINES = {WITHOUT_ANCHORS: ["--anchor_path", "none"], "sft": ["--method", "sft"]}
COMPARED = ("seed", "max_steps", "num_train_epochs", "learning_rate", "warmup_steps")  # as in the run itself
LESSONS = "lessons.json"
BASELINE = "SDFT_DEMO_BASELINE"  # set in the environment of a baseline's run, which starts no further ones


class Lessons(TrainerCallback):
    """Callback that evaluates all questions before and after training; rank 0 prints the comparison."""

    def __init__(self) -> None:
        self.trainer: MethodTrainer | None = None
        self.before: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ranks.tell(f"Asking {len(questions())} questions before training.")
        self.before = self.accuracies()
        if state.is_world_process_zero:
            file = Path(args.output_dir, LESSONS)
            if state.global_step > 0 and file.exists():  # resumed: keep the accuracies from before step 1
                self.before = json.loads(file.read_text())["before"]
            else:
                write_figures(Path(args.output_dir), state.global_step, records(self.before))
            save({"before": self.before}, Path(args.output_dir))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.preemption.agreed:
            return
        ranks.tell(f"Asking {len(questions())} questions after training.")
        after = self.accuracies()
        if state.is_world_process_zero:
            write_figures(Path(args.output_dir), state.global_step, records(after))
            anchored = self.trainer.anchor_dataset is not None
            names = [name for name in BASELINES if name != WITHOUT_ANCHORS or anchored]
            others = baselines(args, names) if args.method == "sdft" and not is_baseline() else {}
            report({"before": self.before, args.method: after, **others}, Path(args.output_dir))

    def accuracies(self) -> dict[str, float]:
        """Accuracy of greedy answers per group. Collective: every rank must call it."""
        builder, asked = self.trainer.prompts, questions()
        prompts = [builder.render(question.messages).ids for question in asked]
        options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
        completions = self.trainer.rollouts.generate(prompts, [""] * len(prompts), **options)
        answers = [builder.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
        return answer_accuracies(answers, asked)


def records(accuracies: dict[str, float]) -> list[dict[str, Any]]:
    """The accuracies as lines of evaluations.jsonl, for the page and the verdict."""
    rows = Counter(question.group for question in questions())
    return [
        {"task": task, "rows": rows[group], "accuracy": accuracies[group]}
        for group, task in TASKS.items()
        if group in accuracies
    ]


def dataset() -> Dataset:
    """The demonstrations of the new facts."""
    return Dataset.from_list(train_rows())


def anchors(args: SDFTConfig, anchor_path: list[str] | None) -> Dataset | None:
    """Questions about unknown people, where the teacher is the model at the start; None with --anchor_path none."""
    if args.method != "sdft" or anchor_path == ["none"] or args.teacher_model_kind != "base":
        return None
    return Dataset.from_list(anchor_rows())


def trainer(args: SDFTConfig, peft_config: PeftConfig | None, anchor_path: list[str] | None) -> MethodTrainer:
    """The demo's trainer with the given settings. Raises ValueError for anchors of one's own."""
    if anchor_path not in (None, ["none"]):
        raise ValueError(
            "The demo has its own anchors: leave --anchor_path out, or set it to none; for anchors of your own "
            "set --model_name_or_path."
        )
    lessons = Lessons()
    made = TRAINERS[args.method](
        model=str(MODEL_DIR),
        args=args,
        train_dataset=dataset(),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        callbacks=[lessons],
        peft_config=peft_config,
        anchor_dataset=anchors(args, anchor_path),
    )
    lessons.trainer = made
    return made


def is_baseline() -> bool:
    return BASELINE in os.environ


def baselines(args: TrainingArguments, names: list[str]) -> dict[str, dict[str, float]]:
    """Accuracies after the baselines' runs on the same demonstrations, side by side in processes on the CPU."""
    # Without this run's launcher variables and those that accelerate sets for DeepSpeed.
    launched = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "DS_", *COUNTS_OF_PROCESSES)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", BASELINE: "1"}
    running = {}
    if names:
        ranks.tell(f"Training {' and '.join(COLUMNS[name] for name in names)} on the same rows, to compare.")
    for name in names:
        equal = [word for flag in COMPARED for word in (f"--{flag}", str(getattr(args, flag)))]
        command = [sys.executable, "-m", "sdft_ds.train", *equal, *BASELINES[name]]
        command += ["--output_dir", str(Path(args.output_dir, name))]
        running[name] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    said = {name: process.communicate()[0] for name, process in running.items()}
    if any(process.returncode == INTERRUPTED for process in running.values()):
        return {}  # by a Ctrl-C, which reaches them as well
    for name, process in running.items():
        if process.returncode:
            raise RuntimeError(f"The baseline {name} failed:\n{said[name]}")
    lessons = {name: json.loads(Path(args.output_dir, name, LESSONS).read_text()) for name in names}
    return {name: lessons[name]["sft" if name == "sft" else "sdft"] for name in names}


def report(figures: dict[str, dict[str, float]], output_dir: Path) -> None:
    """Prints a table with the columns `before`, `sdft` and `sft`, and writes it as JSON to output_dir."""
    table = Table(title="Right answers to questions without context, unless noted")
    for name in ("", *figures):
        table.add_column(COLUMNS.get(name, name), justify="right" if name else "left")
    for group, meaning in MEANING.items():
        table.add_row(meaning, *(f"{values[group]:.2f}" for values in figures.values()))
    console = Console()
    console.print(table)
    before, *after = figures.values()
    if "sdft" in figures:
        supervised = "; supervised fine-tuning kept {old:.0%}".format(**figures["sft"]) if "sft" in figures else ""
        console.print(
            f"Self-distillation taught {figures['sdft']['new_trained']:.0%} of the new facts and kept "
            f"{figures['sdft']['old']:.0%} of the old ones{supervised}."
        )
    if WITHOUT_ANCHORS in figures:
        console.print(
            f"Anchors, questions about other unknown people, kept {figures['sdft']['unknown']:.0%} of "
            f'"I do not know."; without them {figures[WITHOUT_ANCHORS]["unknown"]:.0%} are left.'
        )
    if after[0]["unknown"] < 0.95 * before["unknown"]:
        console.print('What is lost: saying "I do not know." when asked about people it never heard of.')
    save(figures, output_dir)


def save(figures: dict[str, dict[str, float]], output_dir: Path) -> None:
    with atomic_write(Path(output_dir, LESSONS)) as aside:
        aside.write_text(json.dumps(figures, indent=2) + "\n")
