"""Seconds per optimizer step and memory of this project and of TRL 1.16 on the same model, prompts, completion lengths
and loss: in one process without DeepSpeed, and on two ranks under ds_configs/zero2.json and zero3.json.

    python -m benchmarks.small_models FOLDER
    python -m benchmarks.step_time --model FOLDER [--engines none zero2 zero3] [--workloads context skew mixed]
                                   [--json FILE]                       the benchmark extra installs TRL 1.16

Both run in turn (A B A B), each run in processes of its own (with DeepSpeed, by its launcher), from the same weights.
A short first step of a run is not counted. Sampling is greedy and every completion ends at a length that its prompt
fixes, so both train on the same tokens: the losses of the first counted step must agree. Teacher: live, the cheapest
of TRL's. Neither checkpoints activations. Memory is the largest resident set of a rank in the counted steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

from sdft_ds.distributed.launch import free_port

CONFIGS = Path(__file__).parents[1] / "ds_configs"
RANKS = {"none": 1, "zero2": 2, "zero3": 2}
WORDS = "the river runs past an old stone bridge where people meet to talk about work weather and the price of bread"


@dataclass(frozen=True)
class Workload:
    """lengths: of the completions of one step, one for each prompt. words: length of the privileged context.
    batch_size: rows of a micro-batch, of all ranks."""

    purpose: str
    lengths: tuple[int, ...]
    words: int
    generations: int
    batch_size: int
    accumulation: int


WORKLOADS = {
    "context": Workload("8 generations of one prompt, context of 800 words, 128 tokens", (128,), 800, 8, 8, 1),
    "skew": Workload(
        "16 prompts, most completions short, a few long",
        (8, 12, 16, 192, 10, 24, 9, 14, 20, 11, 128, 13, 18, 8, 15, 22), 60, 1, 16, 1,
    ),
    "mixed": Workload(
        "accumulation 4, lengths 32 to 256", (32, 48, 256, 64, 40, 96, 160, 36, 128, 56, 80, 44, 200, 72, 112, 33),
        120, 1, 4, 4,
    ),
}  # fmt: skip


def rows(workload: Workload, steps: int) -> list[dict]:
    """Rows of a short step, which warms up, and of `steps` more."""
    words = (WORDS.split() * (workload.words // 20 + 1))[: workload.words]
    return [
        {
            "prompt": [{"role": "user", "content": f"Tell me what you know about river number {i} of {step}."}],
            "privileged_context": f"About number {i}: " + " ".join(words if step else words[:8]),
        }
        for step in range(1 + steps)
        for i in range(len(workload.lengths))
    ]


class EndAt(LogitsProcessor):
    """Lets the end-of-sequence token come exactly at the length that the row's prompt fixes."""

    def __init__(self, prompts: torch.Tensor, lengths: dict[tuple[int, ...], int], end: int, pad: int):
        self.width, self.end = prompts.shape[1], end
        self.length_of = {tuple(row): lengths[without(pad, row)] for row in prompts.tolist()}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids.shape[1] - self.width + 1
        last = [said >= self.length_of[tuple(row)] for row in input_ids[:, : self.width].tolist()]
        scores[:, self.end] = float("-inf")
        ending = torch.tensor(last, device=scores.device)
        scores[ending] = float("-inf")
        scores[ending, self.end] = 0.0
        return scores


def without(pad: int, row: list[int]) -> tuple[int, ...]:
    return tuple(token for token in row if token != pad)


def force_lengths(model, tokenizer, data: list[dict], workload: Workload) -> None:
    """Patch `generate` of this model object, which both tools call."""
    lengths = {}
    for i, row in enumerate(data):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        step, number = divmod(i, len(workload.lengths))
        lengths[without(tokenizer.pad_token_id, ids)] = workload.lengths[number] if step else 8
    generate = type(model).generate.__get__(model)

    def forced(input_ids, **kwargs):
        processor = EndAt(input_ids, lengths, tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
        return generate(input_ids, logits_processor=LogitsProcessorList([processor]), **kwargs)

    model.generate = forced


class Clock(TrainerCallback):
    """Seconds between the ends of two steps, the logged losses, and the peak of the resident set after the first step,
    in MB."""

    def __init__(self):
        self.ends, self.logs = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        if state.global_step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]

    @staticmethod
    def peak_mb() -> int:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(line.split()[1]) // 1024


def run(tool: str, engine: str, workload: Workload, model_folder: str, dtype: str, steps: int) -> dict:
    """This rank's figures of one training run of `steps` counted steps after one that warms up."""
    deepspeed = {}
    if engine != "none":
        import deepspeed as library

        library.init_distributed("gloo" if not torch.accelerator.is_available() else None, verbose=False)
        deepspeed = {"deepspeed": str(CONFIGS / f"{engine}.json")}
    if tool == "trl":
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        extra = {}
    else:
        from sdft_ds import SDFTConfig, SDFTTrainer

        extra = {"loss_type": "grpo"}  # TRL 1.16 averages over a completion first, and then over completions
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = rows(workload, steps)
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps + 1,
        per_device_train_batch_size=workload.batch_size // RANKS[engine],
        gradient_accumulation_steps=workload.accumulation, num_generations=workload.generations,
        max_completion_length=max(workload.lengths), max_prompt_length=2048, bf16=dtype == "bfloat16",
        gradient_checkpointing=False, teacher_model_kind="live", distillation_alpha=0.0, top_k=1, logging_steps=1,
        learning_rate=1e-6, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(), shuffle_dataset=False, **deepspeed, **extra,
    )  # fmt: skip
    if engine == "none" or dtype == "float32":
        args.model_init_kwargs = {"dtype": "float32"}
    trainer = SDFTTrainer(
        model=model_folder, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    force_lengths(trainer.model, tokenizer, data, workload)
    trainer.train()
    phases = {k: v for k, v in clock.logs[-1].items() if k.startswith("seconds/")}
    return {"seconds": clock.seconds, "loss": clock.logs[1]["loss"], "peak_mb": clock.peak_mb(), "phases": phases}


def measure(tool: str, engine: str, name: str, model: str, dtype: str, steps: int) -> dict:
    """`run` in processes of its own; seconds and memory are those of the slowest and of the largest rank."""
    ranks = RANKS[engine]
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // ranks)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.step_time"]
    if engine != "none":
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        command = [*runner, "--no_local_rank", "--master_port", str(free_port()), "--module", "benchmarks.step_time"]
    with tempfile.TemporaryDirectory() as folder:
        cell = ["--model", model, "--dtype", dtype, "--steps", str(steps), "--cell", tool, engine, name, folder]
        done = subprocess.run([*command, *cell], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{tool}, {engine}, {name}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return {
        **found[0],
        "seconds": [max(of_ranks) for of_ranks in zip(*(each["seconds"] for each in found), strict=True)],
        "peak_mb": max(each["peak_mb"] for each in found),
    }


def compare(engine: str, name: str, model: str, dtype: str, steps: int, rounds: int) -> dict:
    """Both tools in turn. Raises RuntimeError where their losses differ: then they did not do the same work."""
    runs = {"sdft_ds": [], "trl": []}
    for _ in range(rounds):
        for tool in runs:
            runs[tool].append(measure(tool, engine, name, model, dtype, steps))
    first = {tool: found[-1]["loss"] for tool, found in runs.items()}
    tolerance = 2e-3 if dtype == "float32" else 5e-2
    if abs(first["trl"] - first["sdft_ds"]) > tolerance * abs(first["trl"]) + 1e-6:
        raise RuntimeError(f"{engine}, {name}: the losses of the first step differ: {first}.")
    seconds = {}
    for tool, found in runs.items():
        values = [value for each in found for value in each["seconds"]]
        seconds[tool] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {
        "engine": engine, "workload": name, "dtype": dtype, "loss": first, "seconds": seconds,
        "ratio": seconds["trl"]["median"] / seconds["sdft_ds"]["median"],
        "peak_mb": {tool: max(each["peak_mb"] for each in found) for tool, found in runs.items()},
        "phases": runs["sdft_ds"][-1]["phases"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--engines", nargs="+", choices=list(RANKS), default=list(RANKS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the arithmetic")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each tool")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        tool, engine, name, folder = args.cell
        figures = run(tool, engine, WORKLOADS[name], args.model, args.dtype, args.steps)
        Path(folder, f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(figures))
        if torch.distributed.is_initialized():  # TRL leaves it to the end of the process, whose threads may abort then
            torch.distributed.destroy_process_group()
        return
    results = []
    print("s/step: min / median / max; MB: peak of the largest rank\n")
    print("| engine | workload | sdft_ds s/step | TRL 1.16 s/step | TRL / sdft_ds | sdft_ds MB | TRL 1.16 MB |")
    print("|---|---|---|---|---|---|---|")
    for engine in args.engines:
        for name in args.workloads:
            result = compare(engine, name, args.model, args.dtype, args.steps, args.rounds)
            results.append(result)
            cells = [
                " / ".join(f"{result['seconds'][tool][which]:.2f}" for which in ("min", "median", "max"))
                for tool in ("sdft_ds", "trl")
            ]
            cells += [f"{result['ratio']:.2f}", *(str(result["peak_mb"][tool]) for tool in ("sdft_ds", "trl"))]
            print(f"| {engine} | {name} | " + " | ".join(cells) + " |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
        mean = statistics.geometric_mean([each["ratio"] for each in results if each["engine"] == engine])
        print(f"| {engine} | geometric mean | | | {mean:.2f} | | |", flush=True)


if __name__ == "__main__":
    main()
