"""How the cost grows: the loss with N and V, the teacher's pass with context and generations, a step with ranks, and
the student's forward and backward beside a bare one of transformers on the same tokens.

    python -m benchmarks.small_models FOLDER
    python -m benchmarks.scaling --model FOLDER [--parts loss teacher student ranks] [--json FILE]

In fp32. Each figure is the median of three after one that warms up; ranks have one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.memory import CONFIGS
from benchmarks.step_time import WORDS, Clock
from sdft_ds.distributed.launch import free_port


def median_seconds(call: Callable[[], None], times: int = 3) -> float:
    call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def loss(model_folder: str) -> list[list]:
    from sdft_ds.loss.chunked import HeadValues, LossTerms, chunked_distillation_loss
    from sdft_ds.loss.divergence import Divergence

    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n, v in ((512, 49152), (1024, 49152), (2048, 49152), (1024, 16384), (1024, 152064)):
        hidden, teacher = torch.randn(n, 576, device=device).requires_grad_(), torch.randn(n, 576, device=device)
        head = torch.randn(v, 576, device=device).requires_grad_()
        row = [n, v]
        for divergence in (Divergence("full_logits", 0.5), Divergence("topk_logits", 0.5, topk=100)):
            ones = torch.ones(n, device=device)
            terms = LossTerms(divergence, teacher, None, torch.zeros(n, dtype=torch.long, device=device), ones)

            def both_ways(terms=terms, hidden=hidden, head=head, ones=ones):
                chunked_distillation_loss(hidden, HeadValues(head), terms, ones.sum(), lambda x: x)[0].backward()

            row.append(round(median_seconds(both_ways), 3))
        found.append(row)
    return found


def trainer_of(model_folder: str, words: int, generations: int, batch_size: int, callbacks=(), **settings):
    from datasets import Dataset

    from sdft_ds import SDFTConfig, SDFTTrainer

    context = " ".join((WORDS.split() * (words // 20 + 1))[:words])
    prompt = [{"role": "user", "content": "Tell me what you know about the river."}]
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=4, per_device_train_batch_size=batch_size, max_prompt_length=2048,
        num_generations=generations, max_completion_length=32, bf16=False, activation_checkpointing=False,
        teacher_model_kind="live", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"}, learning_rate=1e-6,
        generation_kwargs={"min_new_tokens": 32}, **settings,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": prompt, "privileged_context": context}] * 8)
    return SDFTTrainer(model=model_folder, args=args, train_dataset=dataset, callbacks=list(callbacks))


def teacher(model_folder: str) -> list[list]:
    found = []
    for words, generations in ((100, 8), (200, 8), (400, 8), (800, 8), (400, 1), (400, 2), (400, 4)):
        clock = Clock()
        trainer_of(model_folder, words, generations, 8, [clock]).train()
        found.append(
            [words, generations, round(statistics.median(log["seconds/teacher"] for log in clock.logs[1:]), 3)]
        )
    return found


def student(model_folder: str) -> list[list]:
    """[tokens, our seconds, bare seconds, speed relative to bare]."""
    trainer = trainer_of(model_folder, 20, 8, 8)
    inputs, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    model = trainer.model.train()
    ids = inputs[0]["scored"].batch.student.input_ids_LT
    ours = median_seconds(lambda: trainer.compute_loss(model, inputs[0]).backward())
    bare = median_seconds(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    return [[ids.numel(), round(ours, 3), round(bare, 3), round(bare / ours, 2)]]


def ranks(model_folder: str) -> list[list]:
    """[ranks, seconds per step] with 8 rows a step, ZeRO-2."""
    found = []
    for world_size in (1, 2):
        port, processes = free_port(), []
        for rank in range(world_size):
            environment = {
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.scaling", "--model", model_folder, "--rank"]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"A rank of {world_size} failed.")
        found.append([world_size, json.loads(outputs[0].splitlines()[-1])])
    return found


def rank(model_folder: str) -> None:
    clock = Clock()
    batch_size = 8 // int(os.environ["WORLD_SIZE"])
    trainer_of(model_folder, 100, 8, batch_size, [clock], deepspeed=str(CONFIGS / "zero2.json")).train()
    print(f"\n{json.dumps(round(statistics.median(clock.seconds), 3))}")


PARTS = {
    "loss": (loss, ["tokens N", "vocabulary V", "full vocabulary, s", "top-100, s"]),
    "teacher": (teacher, ["words of context", "generations", "teacher's pass of 8 rows, s"]),
    "student": (student, ["tokens", "student forward + loss + backward, s", "bare transformers, s", "relative speed"]),
    "ranks": (ranks, ["ranks of one thread", "step of 8 rows, s"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.model)
        return
    figures = {}
    for part in args.parts:
        measure, columns = PARTS[part]
        figures[part] = measure(args.model)
        print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for row in figures[part]:
            print(f"| {' | '.join(map(str, row))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
