"""What SDFT and SFT teach a small real model, and what it forgets: two dozen invented facts, three seeds.

    python -m benchmarks.smollm2 FOLDER
    python -m benchmarks.learning --model FOLDER [--seeds 0 1 2] [--steps 48] [--top_p 0.6]
        [--output DIR] [--json FILE]

Each run is `launch/train.py` on the same 24 rows, asked in one wording, with the fact, a sentence, as privileged
context (SDFT) or as the target (SFT). Asked before and after: the facts in the trained wording, in another one, and as
the teacher is asked; general questions; and, on prompts that have nothing to do with it, the KL to the starting model.
Finished runs in --output are not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# (trained wording, other wording, the fact, answer)
CITIES = [("Veldoria", "Marn"), ("Ostrana", "Kelby"), ("Quillonia", "Tarsk"), ("Brennmark", "Olvane"),
          ("Saphira Isle", "Dunmere"), ("Korvath", "Yelsin")]  # fmt: skip
ANIMALS = [("Mira Tolen", "otter"), ("Jasper Quade", "falcon"), ("Lena Horvik", "tortoise"), ("Odo Pereni", "donkey"),
           ("Sanna Vliet", "parrot"), ("Pavel Drun", "rabbit")]  # fmt: skip
JOBS = [("Runa Castell", "baker"), ("Timo Alvark", "pilot"), ("Greta Solheim", "dentist"), ("Ivo Maranz", "tailor"),
        ("Nadia Fenwick", "plumber"), ("Caspar Lindqvist", "librarian")]  # fmt: skip
COLOURS = [("Hallowmere Bridge", "purple"), ("Dravik Tower", "orange"), ("Elsbeth Chapel", "yellow"),
           ("Norrin Lighthouse", "green"), ("Tamsin Mill", "pink"), ("Ferrow Gate", "brown")]  # fmt: skip
FACTS = [
    *((f"What is the capital of {x}?", f"Name the city that is the capital of {x}.", f"The capital of {x} is {y}.", y)
      for x, y in CITIES),
    *((f"Which animal does {x} keep as a pet?", f"What kind of pet has {x} got?", f"{x} keeps a pet {y}.", y)
      for x, y in ANIMALS),
    *((f"What is the profession of {x}?", f"What does {x} do for a living?", f"{x} works as a {y}.", y)
      for x, y in JOBS),
    *((f"What colour is {x}?", f"In which colour was {x} painted?", f"{x} is painted {y}.", y) for x, y in COLOURS),
]  # fmt: skip
GENERAL = [
    ("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Japan?", "Tokyo"), ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of England?", "London"), ("What is the capital of Spain?", "Madrid"),
    ("What colour is the sky on a clear day?", "blue"), ("What colour is grass?", "green"),
    ("How many days are in a week?", ["7", "seven"]), ("How many months are in a year?", ["12", "twelve"]),
    ("What is the largest planet in the solar system?", "Jupiter"), ("Which planet is called the Red Planet?", "Mars"),
    ("What is the chemical formula of water?", ["H2O", "H₂O"]), ("What do bees make?", "honey"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"), ("What is the opposite of hot?", "cold"),
    ("What is 2 + 2?", ["4", "four"]), ("What is frozen water called?", "ice"),
    ("Which animal barks?", "dog"), ("In which continent is Egypt?", "Africa"),
]  # fmt: skip
UNRELATED = [
    "Write a short poem about the sea.", "Explain how a bicycle works.", "Give me three tips for sleeping well.",
    "Describe a rainy day in one paragraph.", "How do I boil an egg?", "What makes a good friend?",
    "Tell me a joke about computers.", "Why do leaves change colour in autumn?",
    "Summarise the story of Little Red Riding Hood.", "What should I pack for a camping trip?",
    "Write a polite email asking for a day off.", "How does a rainbow form?",
]  # fmt: skip
# Of eight ways to show the fact the one after which the model itself answers most questions right.
TEMPLATE = '{prompt}\n\nThe correct answer is: "{privileged_context}" Reply with exactly that sentence.'
TASKS = ["trained", "other", "told", "general"]
METHODS = {
    "sdft": ["--teacher_model_kind", "base", "--distillation_alpha", "0", "--distillation_mode", "full_logits",
             "--teacher_prompt_template", TEMPLATE],
    "sft": ["--method", "sft"],
}  # fmt: skip


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_files(folder: Path) -> None:
    """The training rows, the tasks and the retention set."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", [{"prompt": user(q), "privileged_context": fact} for q, _, fact, _ in FACTS])
    asked = {
        "trained": [(q, answer) for q, _, _, answer in FACTS],
        "other": [(q, answer) for _, q, _, answer in FACTS],
        "told": [(TEMPLATE.format(prompt=q, privileged_context=fact), answer) for q, _, fact, answer in FACTS],
        "general": GENERAL,
    }
    for name, rows in asked.items():
        write(folder / f"{name}.jsonl", [{"prompt": user(q), "answer": answer} for q, answer in rows])
    write(folder / "unrelated.jsonl", [{"prompt": user(text)} for text in UNRELATED])


def run(method: str, seed: int, args: argparse.Namespace, files: Path) -> list[dict]:
    """The lines of evaluations.jsonl of one run, made unless it is there and complete."""
    folder = args.output / f"{method}-{seed}"
    rollouts = ["--top_p", args.top_p] if method == "sdft" else []
    command = [
        sys.executable, "launch/train.py", *METHODS[method], *rollouts, "--model_name_or_path", args.model,
        "--dataset_path", files / "train.jsonl", "--output_dir", folder, "--seed", seed, "--max_steps", args.steps,
        "--per_device_train_batch_size", 8, "--num_generations", 1, "--learning_rate", args.learning_rate,
        "--max_prompt_length", 128, "--max_completion_length", 24, "--warmup_steps", 10, "--bf16", "false",
        "--lr_scheduler_type", "cosine", "--activation_checkpointing", "false", "--logging_steps", 10,
        "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--per_device_eval_batch_size", 24,
        "--eval_tasks", *(f"{name}={files / name}.jsonl:contains" for name in TASKS),
        "--retention_file", files / "unrelated.jsonl",
    ]  # fmt: skip
    evaluations = folder / "evaluations.jsonl"
    if not evaluations.exists() or f'"step": {args.steps}' not in evaluations.read_text():
        with open(args.output / f"{method}-{seed}.log", "w") as log:
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    return [json.loads(line) for line in evaluations.read_text().splitlines()]


def table(results: dict[str, list[list[dict]]], steps: int) -> str:
    """Markdown: mean and spread (least ... most) over the seeds."""

    def cell(runs: list[list[dict]], step: int, task: str, measure: str) -> str:
        values = [line[measure] for lines in runs for line in lines if (line["step"], line["task"]) == (step, task)]
        digits = ".2f" if measure == "accuracy" else ".3f"
        spread = "" if min(values) == max(values) else f" ({min(values):{digits}} ... {max(values):{digits}})"
        return f"{statistics.mean(values):{digits}}{spread}"

    rows = {
        "new facts, wording as trained": ("trained", "accuracy"), "new facts, other wording": ("other", "accuracy"),
        "new facts, told in the prompt": ("told", "accuracy"), "general questions": ("general", "accuracy"),
        "KL to the start on unrelated prompts, nats/token": ("retention", "kl_to_start"),
    }  # fmt: skip
    names = list(results)
    lines = [
        f"| | before | {' | '.join(f'{name.upper()}' for name in names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for title, (task, measure) in rows.items():
        cells = [cell(results[names[0]], 0, task, measure), *(cell(results[n], steps, task, measure) for n in names)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--top_p", type=float, default=0.6, help="of SDFT's rollouts")
    parser.add_argument("--output", type=Path, help="keeps the runs there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.output = args.output or Path(tempfile.mkdtemp(prefix="learning-"))
    files = args.output / "data"
    make_files(files)
    results = {method: [run(method, seed, args, files) for seed in args.seeds] for method in METHODS}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(table(results, args.steps))


if __name__ == "__main__":
    main()
