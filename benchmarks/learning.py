"""What SDFT and SFT teach a small real model, and what it forgets: Pareto fronts over methods and learning rates.

    python -m benchmarks.small_models FOLDER
    python -m benchmarks.learning --model FOLDER [--task facts | ten | other-ten | physics | biology] [--data FOLDER]
        [--arms facts sft ...] [--rates 1e-4 2e-4 ...] [--schedule cosine] [--seeds 0 1 2] [--steps 90]
        [--eval_steps 15] [--questions 40] [--jobs 1] [--output DIR] [--json FILE]

Each run is `python -m sdft_ds.train` with the flags of its arm. Every --eval_steps steps it is asked the new task and
general questions, and the KL to the starting model is measured on prompts that have nothing to do with it; with
--schedule constant_with_warmup one run is a whole curve. A point is on the front where no other point of any arm beats
it in both what was learned (mean of the trained and the other wording) and what was kept (KL), or equals it in one and
beats it in the other. Finished runs in --output are not made again.

facts: 24 invented facts, asked in one wording; the fact, a sentence, is the privileged context (SDFT) or the target
(SFT); ten: ten of them, as a first run of one's own; other-ten: ten of other kinds. physics, biology: SciKnowEval as
multiple choice, from --data, a folder with train.json and test.json of the SDFT authors' format.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from benchmarks.learning_data import GENERAL, INVENTED, TOLD, UNRELATED
from sdft_ds.config.recipes import FACTS_TEMPLATE

COMMON = ["--per_device_train_batch_size", "8", "--num_generations", "1", "--warmup_steps", "5",
          "--activation_checkpointing", "false", "--logging_steps", "10", "--report_to", "none",
          "--save_strategy", "no", "--disable_tqdm", "true"]  # fmt: skip
FORWARD = ["--recipe", "trl", "--teacher_model_kind", "base", "--distillation_alpha", "0", "--distillation_mode",
           "full_logits", "--loss_type", "grpo"]  # fmt: skip
TOP_K = ["--distillation_mode", "topk_logits", "--distillation_topk", "100"]
ANCHORED = [*FORWARD, "--anchor_path", "everyday"]
SCIENCE = ("physics", "biology")
SHARP, TEACHER = ["--top_p", "0.6"], ["--teacher_rollout_fraction", "1"]
RECIPE = [*ANCHORED, *SHARP, *TEACHER, "--teacher_prompt_template", FACTS_TEMPLATE]
SURE = ["--teacher_temperature", "0.5"]
# Other templates of the teacher, compared by benchmarks.templates.
SENTENCE = "{prompt}\n\n{privileged_context}\n\nRepeat this sentence word for word."
REPLY = "{prompt}\n\nA good reply would be:\n{privileged_context}\n\nReply to the question like this."
# Flags by arm; replay: the file of the anchors with the model's own answers.
ARMS: dict[str, list[str]] = {
    "forward": FORWARD,
    "forward+sharp": [*FORWARD, *SHARP],
    "forward+teacher": [*FORWARD, *TEACHER],
    "facts-without-anchors": [*FORWARD, *SHARP, *TEACHER],
    "anchors": ANCHORED,
    "anchors+sharp": [*ANCHORED, *SHARP],
    "anchors+teacher": [*ANCHORED, *TEACHER],
    "facts": [*ANCHORED, *SHARP, *TEACHER],
    "recipe": [*RECIPE, *SURE],
    "recipe+lora": [*RECIPE, *SURE, "--use_peft", "true", "--lora_target_modules", "all-linear"],
    "recipe-at-1": RECIPE,
    "told": [*ANCHORED, *SHARP, *TEACHER, *SURE],
    "sentence": [*RECIPE, *SURE, "--teacher_prompt_template", SENTENCE],
    "reply-at-1": [*RECIPE, "--teacher_prompt_template", REPLY],
    "anchors+jsd": [*ANCHORED, "--distillation_alpha", "0.5"],
    "anchors+top-k": [*ANCHORED, *TOP_K],
    "anchors+union": [*ANCHORED, *TOP_K, "--distillation_support", "union", "--distillation_add_tail", "true"],
    "anchors+iterations": [*ANCHORED, "--num_iterations", "2"],
    "anchors+temperature": [*ANCHORED, "--temperature", "0.7"],
    "sft": ["--method", "sft"],
    "sft+replay": ["--method", "sft", "--anchor_path", "replay"],
}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def make_files(folder: Path, task: str) -> None:
    """Training rows, questions and the retention set."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = INVENTED[task]
    write(folder / "train.jsonl", ({"prompt": user(q), "privileged_context": fact} for q, _, fact, _ in facts))
    asked = {
        "trained": [(q, answer) for q, _, _, answer in facts],
        "other": [(q, answer) for _, q, _, answer in facts],
        "told": [(TOLD.format(prompt=q, privileged_context=fact), answer) for q, _, fact, answer in facts],
        "general": GENERAL,
    }
    write_questions(folder, asked)


def make_science_files(folder: Path, source: Path) -> None:
    """The same of SciKnowEval: a question with its options, and as the context a sentence that names the letter, which
    a small teacher takes up where it overlooks the letter alone."""
    folder.mkdir(parents=True, exist_ok=True)

    def questions(split: str) -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in (source / f"{split}.json").read_text().splitlines() if line.strip()]
        asked = "Please reason step by step.", "Answer with the letter only."
        return [(row["prompt"].replace(*asked), row["answer"]) for row in rows]

    def sentence(answer: str) -> str:
        return f"The answer is {answer}."

    train = questions("train")
    sample = train[: len(train) // 8]
    write(folder / "train.jsonl", ({"prompt": user(q), "privileged_context": sentence(a)} for q, a in train))
    asked = {
        "trained": sample,
        "other": questions("test"),
        "told": [(TOLD.format(prompt=q, privileged_context=sentence(a)), a) for q, a in sample],
        "general": GENERAL,
    }
    write_questions(folder, asked)


def write_questions(folder: Path, asked: dict[str, list]) -> None:
    """The (question, answer) pairs of each task, and the retention set."""
    for name, rows in asked.items():
        write(folder / f"{name}.jsonl", ({"prompt": user(q), "answer": answer} for q, answer in rows))
    write(folder / "unrelated.jsonl", ({"prompt": user(text)} for text in UNRELATED))


def make_replay(folder: Path, model: str, longest: int) -> None:
    """The anchors with the model's own greedy answers, which SFT replays."""
    from benchmarks.greedy import Model
    from sdft_ds.cli.dataset_loading import EVERYDAY

    if (folder / "replay.jsonl").exists():
        return
    prompts = [user(json.loads(line)["prompt"]) for line in EVERYDAY.read_text().splitlines()]
    # Longer than a run's completions, so that a run does not take a cut answer for a whole one.
    network = Model(model, 2 * longest)
    answers = network.texts(network.answers(prompts))
    rows = zip(prompts, answers, strict=True)
    write(folder / "replay.jsonl", ({"prompt": prompt, "golden_response": answer} for prompt, answer in rows))


def flags(arm: str, rate: float, seed: int, args: argparse.Namespace, files: Path, output: Path) -> list[str]:
    science = args.task in SCIENCE
    scorer = "choice" if science else "contains"
    own = [str(files / "replay.jsonl") if flag == "replay" else flag for flag in ARMS[arm]]
    rest = [
        "--model_name_or_path", args.model, "--dataset_path", files / "train.jsonl", "--output_dir", output,
        "--teacher_prompt_template", TOLD, "--seed", seed, "--max_steps", args.steps, "--learning_rate", rate,
        "--max_prompt_length", 512 if science else 128, "--max_completion_length", args.longest,
        "--per_device_eval_batch_size", 24, "--bf16", str(args.bf16).lower(),
        "--eval_tasks", *(f"{name}={files / name}.jsonl:{scorer if name != 'general' else 'contains'}"
                          for name in ("trained", "other", "told", "general")),
        "--eval_tasks_steps", args.eval_steps, "--retention_file", files / "unrelated.jsonl",
        *([] if args.questions is None else ["--eval_task_rows", args.questions]),
    ]  # fmt: skip
    return list(map(str, [*COMMON, *rest, *own]))


def train(argv: list[str], output: Path) -> None:
    """One run in this process, its output in a log beside it. A run that fails is shown, and the others go on."""
    from sdft_ds.train import main

    began = time.monotonic()
    with open(f"{output}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            main(argv)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stderr__, flush=True)
            raise RuntimeError(f"{output}: {error}; see {output}.log") from None
    print(f"{output.name}: {time.monotonic() - began:.0f} s", file=sys.__stdout__, flush=True)


def points(folder: Path) -> list[dict]:
    """One point per evaluation of a run: step, and each task's measure."""
    found: dict[int, dict] = {}
    for line in map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines()):
        point = found.setdefault(line["step"], {"step": line["step"]})
        if line["task"] == "retention":
            point["kl"] = line["kl_to_start"]
        else:
            point[line["task"]] = line["accuracy"]
    return [found[step] for step in sorted(found)]


def over_seeds(runs: list[list[dict]]) -> list[dict]:
    """The points of an arm at one rate: means over the seeds, with the least and the largest."""
    merged = []
    for at_step in zip(*runs, strict=True):
        measures = {name: [point[name] for point in at_step] for name in at_step[0] if name != "step"}
        means = {name: statistics.mean(values) for name, values in measures.items()}
        spread = {name: (min(values), max(values)) for name, values in measures.items()}
        merged.append({"step": at_step[0]["step"], **means, "spread": spread})
    return merged


def learned(point: dict) -> float:
    """Share of right answers, the mean of the trained and the other wording."""
    return (point["trained"] + point["other"]) / 2


def front(found: list[dict]) -> list[dict]:
    """The points that no other beats in what was learned without losing in what was kept, or the other way round."""
    return [
        p
        for p in found
        if not any(
            learned(q) >= learned(p) and q["kl"] <= p["kl"] and (learned(q) > learned(p) or q["kl"] < p["kl"])
            for q in found
        )
    ]


def table(results: dict[str, dict[float, list[dict]]]) -> str:
    """Markdown: of each arm and rate every evaluated step, those on the front marked."""
    best = front([point for rates in results.values() for found in rates.values() for point in found])
    names = ("trained", "other", "told", "general", "kl")
    lines = [f"| arm | rate | step | {' | '.join(names)} | front |", "|---" * (4 + len(names)) + "|"]
    for arm, rates in results.items():
        for rate, found in rates.items():
            for point in found:
                cells = []
                for name in names:
                    least, most = point["spread"][name]
                    digits = ".3f" if name == "kl" else ".2f"
                    spread = f" ({least:{digits}} ... {most:{digits}})" if least != most else ""
                    cells.append(f"{point[name]:{digits}}{spread}")
                mark = "x" if any(point is other for other in best) else ""
                lines.append(f"| {arm} | {rate:g} | {point['step']} | {' | '.join(cells)} | {mark} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=[*INVENTED, *SCIENCE], default="facts")
    parser.add_argument("--data", type=Path, help="the folder of the science tasks")
    parser.add_argument(
        "--arms", nargs="+", default=["facts", "facts-without-anchors", "sft", "sft+replay"], choices=list(ARMS)
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schedule", default="cosine", choices=["cosine", "constant_with_warmup"])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--eval_steps", type=int, default=15)
    parser.add_argument("--questions", type=int, help="most questions of each task; all, if left out")
    parser.add_argument("--longest", type=int, default=24, help="most tokens of a completion")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 0: the table of the finished ones")
    parser.add_argument("--output", type=Path, help="keeps the runs there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.output = args.output or Path(tempfile.mkdtemp(prefix="learning-"))
    return args


def main() -> None:
    args = parsed()
    files = args.output / f"data-{args.task}"
    if args.task in SCIENCE:
        make_science_files(files, args.data)
    else:
        make_files(files, args.task)
    make_replay(files, args.model, args.longest)
    os.environ["HF_HUB_OFFLINE"] = "1"
    unfinished = []
    for seed, arm, rate in itertools.product(args.seeds, args.arms, args.rates):
        output = args.output / f"{args.task}-{arm}-{rate:g}-{seed}"
        done = output / "evaluations.jsonl"
        if not (done.exists() and f'"step": {args.steps},' in done.read_text()):
            unfinished.append((flags(arm, rate, seed, args, files, output), output))
    failed = []
    if args.jobs and unfinished:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            runs = [pool.submit(train, *run) for run in unfinished]
            failed = [error for run in runs if (error := run.exception())]
    for error in failed:
        print(error, file=sys.stderr)
    results: dict[str, dict[float, list[dict]]] = {}
    for arm in args.arms:
        for rate in args.rates:
            folders = [args.output / f"{args.task}-{arm}-{rate:g}-{seed}" for seed in args.seeds]
            complete = [points(f) for f in folders if (f / "evaluations.jsonl").exists()]
            longest = max((len(each) for each in complete), default=0)
            complete = [each for each in complete if len(each) == longest]
            if complete:
                results.setdefault(arm, {})[rate] = over_seeds(complete)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
