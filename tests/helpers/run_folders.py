"""Folders as runs leave them, with numbers that are made up and always the same."""

import json
import math
import random
from pathlib import Path

import pyarrow
from pyarrow import parquet

WORDS = [
    " the",
    " answer",
    " is",
    " four",
    ",",
    " because",
    " two",
    " and",
    " make",
    ".",
    "\n",
    " it",
    " 7",
    "é",
    " so",
]


def log_line(step: int, steps: int, noise: random.Random, speed: float = 6.0) -> dict:
    """A line of metrics.jsonl: everything falls, grows or wobbles as in a run that goes well."""
    left = math.exp(-speed * step / steps)
    divergence = (0.02 + 1.2 * left) * noise.lognormvariate(0, 0.25)
    length = 40 + 25 * left + noise.gauss(0, 3)
    return {
        "step": step, "epoch": step / 100, "time": 1.79e9 + 2.5 * step,
        "loss": divergence, "grad_norm": (0.4 + 2 * left) * noise.lognormvariate(0, 0.3),
        "learning_rate": 2e-5 * min(1, step / (0.1 * steps)),
        "sdft/distillation_loss": divergence,
        "divergence/p50": divergence * 0.1, "divergence/p90": divergence * 2.5, "divergence/p99": divergence * 12,
        **{
            f"divergence/position_{span}": divergence * factor * noise.lognormvariate(0, 0.2)
            for span, factor in (("0_4", 3.0), ("4_16", 1.6), ("16_64", 0.9), ("64_256", 0.4), ("256_up", 0.15))
        },
        "entropy/student": 0.6 + 0.5 * left + noise.gauss(0, 0.02), "entropy/teacher": 0.55 + noise.gauss(0, 0.02),
        "agreement/argmax": 0.98 - 0.3 * left + noise.gauss(0, 0.005),
        "topk/student_mass": 0.995 - 0.01 * left, "topk/teacher_mass": 0.995 - 0.05 * left,
        "completions/mean_length": length, "completions/min_length": length / 3,
        "completions/max_length": length * 2.4,
        "completions/clipped_ratio": 0.2 * left, "completions/empty_ratio": 0.0, "completions/loss_tokens": 5000.0,
        "teacher/distance": 0.2 + 0.6 * left, "tokens/per_second": 900 + noise.gauss(0, 40),
        "tokens/padding_share": 0.08, "memory/peak_gib": 31.4, "steps/nonfinite": 0.0,
        "seconds/rollout": 1.4 + noise.gauss(0, 0.1), "seconds/teacher": 0.35 + noise.gauss(0, 0.02),
        "seconds/student": 0.8 + noise.gauss(0, 0.03), "seconds/optimizer": 0.12,
    }  # fmt: skip


def completion_row(step: int, length: int, noise: random.Random, **overrides) -> dict:
    """A row of completions/step-N.parquet."""
    words = [noise.choice(WORDS) for _ in range(length)]
    divergences = [None if i < 2 else noise.lognormvariate(-3, 2) for i in range(length)]
    counted = [d for d in divergences if d is not None]

    def top(first: str, p: float) -> list[dict]:
        rest = [word for word in WORDS if word != first][:4]
        return [{"token": first, "p": p}, *({"token": w, "p": (1 - p) / 2 ** (i + 1)} for i, w in enumerate(rest))]

    return {
        "step": step, "prompt": "<|user|>\nWhat is 2 + 2?<|end|>\n<|assistant|>\n",
        "teacher_prompt": "<|user|>\nWhat is 2 + 2?\n\nThe correct answer is 4.<|end|>\n<|assistant|>\n",
        "completion": "".join(words), "length": length, "truncated": length >= 96,
        "divergence_mean": sum(counted) / len(counted) if counted else None,
        "tokens": words, "divergence": divergences,
        "student_top": [top(word, noise.uniform(0.3, 0.99)) for word in words],
        "teacher_top": [top(noise.choice(WORDS), noise.uniform(0.3, 0.99)) for _ in words],
        **overrides,
    }  # fmt: skip


def make(
    folder: Path, steps: int = 60, method: str = "sdft", rows: list[dict] | None = None, speed: float = 6.0
) -> Path:
    """A run folder with all four of its parts; `rows` are the completions of the last step."""
    noise = random.Random(f"{method} {steps}")
    write_log(folder, [log_line(step, steps, noise, speed) for step in range(1, steps + 1)])
    write_completions(folder, 1, [completion_row(1, noise.randint(20, 100), noise) for _ in range(3)])
    last = rows or [completion_row(steps, noise.randint(20, 100), noise) for _ in range(3)]
    write_completions(folder, steps, last)
    kept = 0.91 if method == "sdft" else 0.62
    write_lines(folder / "evaluations.jsonl", [
        {"step": 0, "task": "new facts", "rows": 200, "accuracy": 0.02, "kl_to_start": 0.0},
        {"step": 0, "task": "old facts", "rows": 400, "accuracy": 0.94, "kl_to_start": 0.0},
        {"step": steps, "task": "new facts", "rows": 200, "accuracy": 0.97, "kl_to_start": 0.31},
        {"step": steps, "task": "old facts", "rows": 400, "accuracy": kept, "kl_to_start": 0.08},
    ])  # fmt: skip
    config = {"learning_rate": 2e-05, "teacher_model_kind": "ema", "seed": 42, "deepspeed": None,
              "output_dir": str(folder), "num_generations": 1, "method_note": method}  # fmt: skip
    (folder / "run.json").write_text(json.dumps({
        "config": config, "model": "org/a-model", "method": method, "started": 1.79e9, "finished": 1.79e9 + 3900,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "environment": {"host": "node-3", "accelerator": "cpu", "world_size": 2, "python": "3.11.9"},
    }))  # fmt: skip
    return folder


def write_log(folder: Path, log: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "metrics.jsonl", log)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_completions(folder: Path, step: int, rows: list[dict]) -> None:
    (folder / "completions").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "completions" / f"step-{step}.parquet")
