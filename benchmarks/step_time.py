"""Seconds per optimizer step of this project and of TRL 1.16 on the same model, prompts, completion lengths and loss.

    python -m benchmarks.smollm2 FOLDER
    python -m benchmarks.step_time --model FOLDER [--workloads context skew mixed] [--json FILE]
                                                                       the benchmark extra installs TRL 1.16

Both run in turn (A B A B) in one process, each time from the same weights; a short first step of a run is not counted.
Sampling is greedy and every completion ends at a length that its prompt fixes, so both train on the same tokens: the
losses of the first counted step must agree. Teacher: live, the cheapest of TRL's. Neither checkpoints
activations.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback

WORDS = "the river runs past an old stone bridge where people meet to talk about work weather and the price of bread"


@dataclass(frozen=True)
class Workload:
    """lengths: of the completions of one step, one for each prompt. words: length of the privileged context."""

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
    """Seconds between the ends of two steps, and the logged losses."""

    def __init__(self):
        self.ends, self.logs = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


def run(tool: str, workload: Workload, model_folder: str, dtype: str, steps: int) -> Clock:
    """One training run of `steps` counted steps after one that warms up."""
    clock = Clock()
    if tool == "trl":
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        extra = {}
    else:
        from sdft_ds import SDFTConfig, SDFTTrainer

        extra = {"loss_type": "grpo"}  # TRL 1.16 averages over a completion first, and then over completions
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    data = rows(workload, steps)
    force_lengths(model, tokenizer, data, workload)
    on_cpu = not torch.accelerator.is_available()
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps + 1, per_device_train_batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.accumulation, num_generations=workload.generations,
        max_completion_length=max(workload.lengths), max_prompt_length=2048, bf16=dtype == "bfloat16",
        gradient_checkpointing=False, teacher_model_kind="live", distillation_alpha=0.0, top_k=1, logging_steps=1,
        learning_rate=1e-6, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=on_cpu,
        shuffle_dataset=False, **extra,
    )  # fmt: skip
    trainer = SDFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    return clock


def compare(name: str, model: str, dtype: str, steps: int, rounds: int) -> dict:
    """Both tools in turn. Raises RuntimeError where their losses differ: then they did not do the same work."""
    workload = WORKLOADS[name]
    seconds, first, phases = {"sdft_ds": [], "trl": []}, {}, {}
    for _ in range(rounds):
        for tool in seconds:
            clock = run(tool, workload, model, dtype, steps)
            seconds[tool] += clock.seconds
            first[tool] = clock.logs[1]["loss"]
            phases[tool] = {k: v for k, v in clock.logs[-1].items() if k.startswith("seconds/")}
    tolerance = 2e-3 if dtype == "float32" else 5e-2
    if abs(first["trl"] - first["sdft_ds"]) > tolerance * abs(first["trl"]) + 1e-6:
        raise RuntimeError(f"{name}: the losses of the first step differ: {first}.")
    summary = {
        tool: {"min": min(values), "median": statistics.median(values), "max": max(values)}
        for tool, values in seconds.items()
    }
    ratio = summary["trl"]["median"] / summary["sdft_ds"]["median"]
    return {
        "workload": name, "dtype": dtype, "loss": first, "seconds": summary, "ratio": ratio,
        "phases": phases["sdft_ds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the arithmetic")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each tool")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    results = []
    print("| workload | sdft_ds s/step, min / median / max | TRL 1.16 s/step, min / median / max | ratio |")
    print("|---|---|---|---|")
    for name in args.workloads:
        result = compare(name, args.model, args.dtype, args.steps, args.rounds)
        results.append(result)
        cells = [
            " / ".join(f"{result['seconds'][tool][which]:.2f}" for which in ("min", "median", "max"))
            for tool in ("sdft_ds", "trl")
        ]
        print(f"| {name}: {WORKLOADS[name].purpose} | {cells[0]} | {cells[1]} | {result['ratio']:.2f} |", flush=True)
    mean = statistics.geometric_mean([result["ratio"] for result in results])
    print(f"| geometric mean | | | {mean:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"geometric_mean": mean, "workloads": results}, indent=1))


if __name__ == "__main__":
    main()
