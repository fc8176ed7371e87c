"""Demo of SDPO: the embedded model learns a rule from rewards alone.

    python -m sdft_ds.demo.rewards [--seeds 0 1 2] [--steps 120] [--methods sdpo policy]

Each question comes with two statements that contradict each other. The model answers with one or the other; a reward
says which answer was right: the second. Nothing states the rule. A teacher that sees an answer that was right says it
as well, and the student learns from it. `policy` is the policy gradient with the same rewards, completions and steps.
The figures are shares of right answers, sampled, to questions about other people in other wordings.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

from sdft_ds.config.sdpo_config import SDPOConfig
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.demo.world import RELATIONS, UNKNOWN_NAMES, user
from sdft_ds.evaluation.rewards import scorer_reward
from sdft_ds.trainer import SDPOTrainer

TRAINED, HELD_OUT = UNKNOWN_NAMES[:30], UNKNOWN_NAMES[30:]
# Tuned by hand on seed 0. The embedded model does not know the words of the default templates, and is more likely to
# believe what is said three times.
SETTINGS: dict[str, Any] = {
    "num_generations": 8,
    "per_device_train_batch_size": 32,
    "max_completion_length": 14,
    "distillation_mode": "full_logits",
    "distillation_alpha": 0.5,
    "teacher_update_rate": 0.05,
    "reprompt_template": "{prompt}{solution}{feedback}",
    "solution_template": "\n\n" + " ".join(3 * ["{successful_previous_attempt}"]),
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "bf16": False,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1000,
    "log_completions": 0,
    "disable_tqdm": True,
}
METHODS = {"sdpo": {"distillation_weight": 1.0}, "policy": {"distillation_weight": 0.0}}


def rows(names: Sequence[str], held_out: bool, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with two statements, of which the second is right."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        relation, name = rng.choice(RELATIONS), rng.choice(names)
        wording = rng.choice(relation.held_out_wordings if held_out else relation.trained_wordings)
        first, second = (relation.statement.format(name=name, value=value) for value in rng.sample(relation.values, 2))
        question = wording.format(name=name)
        made.append({"prompt": user(f"{question}\n\n{first} {second}"), "answer": second})
    return made


def share_right(trainer: SDPOTrainer, asked: list[dict[str, Any]]) -> float:
    """Share of right answers, sampled."""
    prompts = [trainer.prompts.render(row["prompt"]).ids for row in asked]
    completions = trainer.rollouts.generate(prompts, [f"asked/{i}" for i in range(len(asked))])
    answers = [trainer.prompts.tokenizer.decode(c.ids, skip_special_tokens=True) for c in completions]
    right = scorer_reward("exact")(answers, answer=[row["answer"] for row in asked])
    return sum(right) / len(right)


def run(method: str, seed: int, steps: int) -> tuple[float, float]:
    """Shares of right answers before and after training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SDPOTrainer(
            str(MODEL_DIR),
            scorer_reward("exact"),
            SDPOConfig(output_dir=folder, max_steps=steps, seed=seed, **SETTINGS, **METHODS[method]),
            Dataset.from_list(rows(TRAINED, False, 512, seed)),
            processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        )
        asked = rows(HELD_OUT, True, 256, seed + 1000)
        before = share_right(trainer, asked)
        trainer.train()
        trainer.rollouts.weights_changed()
        return before, share_right(trainer, asked)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    own = parser.parse_args(argv)
    logging.set_verbosity_error()
    table = Table("seed", "before", *own.methods, title="Right answers to held-out questions, sampled")
    for seed in own.seeds:
        found = [run(method, seed, own.steps) for method in own.methods]
        table.add_row(str(seed), f"{found[0][0]:.2f}", *(f"{after:.2f}" for _, after in found))
    Console().print(table)


if __name__ == "__main__":
    main()
