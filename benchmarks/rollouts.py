"""Rollout engines beside one another: tokens per second, seconds per push of weights and per step, and memory.

    bash launch/vllm_environment.sh && . .venv-vllm/bin/activate
    python -m benchmarks.small_models FOLDER
    python -m benchmarks.rollouts --model FOLDER [--engines local colocate ...] [--rows 8 32] [--json FILE]

Each engine trains a few steps in a process of its own, on rows of which either all complete --tokens tokens (even) or
each ends where it ends (skewed). The first step, which starts the engine, and the last, which rolls out nothing ahead,
are left out; of the others the median. A server is started for each run by launch/vllm_server.sh, on the same machine;
its memory is given apart. It shares the cores with training, unless --split gives each half of them.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

from benchmarks.step_time import WORDS, Clock
from sdft_ds.distributed.launch import free_port

ROOT = Path(__file__).parents[1]
COLOCATE = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.3}
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_weight_sync": "path"}
ENGINES = {
    "local": {},
    "continuous": {"rollout_backend": "continuous"},
    "colocate": COLOCATE,
    "server": SERVER,
    "server, lag 1": {**SERVER, "rollout_lag": 1},
}
COLUMNS = ["engine", "rows", "lengths", "tokens/s", "rollout s", "push s", "step s", "peak GiB", "server GiB"]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One engine's figures, in this process."""
    from datasets import Dataset

    from sdft_ds import SDFTConfig, SDFTTrainer

    even = {"generation_kwargs": {"min_new_tokens": args.tokens}} if args.lengths == "even" else {}
    settings = ENGINES[args.engine]
    if "vllm_mode" in settings:
        settings = {**settings, "vllm_server_base_url": args.server}
    context = " ".join(WORDS.split()[:100])
    questions = [f"Tell me {what} about a {thing}." for what in ("a story", "all", "a word", "little")
                 for thing in ("river", "king", "machine", "number", "house", "war", "song", "law")]  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": each}], "privileged_context": context} for each in questions]
    config = SDFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.rows,
        num_generations=4, max_completion_length=args.tokens, bf16=args.bf16, teacher_model_kind="base",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-6,
        **even, **settings,
    )  # fmt: skip
    clock = Clock()
    trainer = SDFTTrainer(args.model, config, train_dataset=Dataset.from_list(rows), callbacks=[clock])
    pushes, publish = [], trainer.rollouts.publish

    def timed() -> None:
        start = time.perf_counter()
        publish()
        pushes.append(time.perf_counter() - start)

    trainer.rollouts.publish = timed
    trainer.train()
    logs = clock.logs[1:-1]
    median = {
        name: statistics.median(log[name] for log in logs) for name in ("seconds/rollout", "completions/mean_length")
    }
    return {
        "tokens/s": args.rows * median["completions/mean_length"] / median["seconds/rollout"],
        "rollout s": median["seconds/rollout"],
        "push s": statistics.median(pushes[1:]) if len(pushes) > 1 else None,
        "step s": statistics.median(clock.seconds[:-1]),
        "peak GiB": logs[-1].get("memory/peak_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20),
    }


class Server:
    """Context manager: a server of the model; yields its address."""

    def __init__(self, model: str, dtype: str, cores: list[int] | None):
        self.port = free_port()
        bound = {} if cores is None else {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        command = ["bash", str(ROOT / "launch/vllm_server.sh"), model, "--port", str(self.port), "--dtype", dtype]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "VENV": sys.prefix, "VLLM_CPU_KVCACHE_SPACE": "1", **bound},
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip

    def __enter__(self) -> "Server":
        self.url = f"http://127.0.0.1:{self.port}"
        while True:
            try:
                requests.get(f"{self.url}/health", timeout=5).raise_for_status()
                return self
            except requests.RequestException:
                if self.process.poll() is not None:
                    raise RuntimeError("The server did not start: run launch/vllm_server.sh to see why.") from None
                time.sleep(1)

    def peak_gib(self) -> float:
        """Of the server and the processes that it started."""
        found, total = [self.process.pid], 0.0
        while found:
            pid = found.pop()
            found += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) / 2**20
        return total

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def run(args: argparse.Namespace, engine: str, rows: int, lengths: str) -> list:
    command = [sys.executable, "-m", "benchmarks.rollouts", "--model", args.model, "--engine", engine]
    command += ["--lengths", lengths, "--rows", str(rows), "--tokens", str(args.tokens), "--steps", str(args.steps)]
    command += ["--bf16"] if args.bf16 else []
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2

    def figures(*more: str) -> dict[str, float]:
        limit = (lambda: os.sched_setaffinity(0, cores[:half])) if args.split and more else None
        output = subprocess.run(
            [*command, *more], stdout=subprocess.PIPE, text=True, check=True, preexec_fn=limit
        ).stdout
        return json.loads(output.splitlines()[-1])

    if "vllm_mode" not in ENGINES[engine]:
        found = figures()
    else:
        with Server(
            args.model, "bfloat16" if args.bf16 else "float32", cores[half:] if args.split else None
        ) as server:
            found = {**figures("--server", server.url), "server GiB": server.peak_gib()}
    shown = [found.get(name) for name in COLUMNS[3:]]
    return [engine, rows, lengths, *("–" if value is None else f"{value:.3g}" for value in shown)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 32], help="completions of a step (8 32)")
    parser.add_argument("--tokens", type=int, default=128, help="most tokens of a completion (128)")
    parser.add_argument("--steps", type=int, default=5, help="with the first and the last, which are not counted (5)")
    parser.add_argument("--lengths", nargs="+", choices=["even", "skewed"], default=["even", "skewed"])
    parser.add_argument(
        "--split", action="store_true", help="a server gets half of the cores, training the other half"
    )
    parser.add_argument("--bf16", action="store_true", help="for a GPU, or a CPU with bf16 units")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--server", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        args.rows, args.lengths = args.rows[0], args.lengths[0]
        print(f"\n{json.dumps(measure(args))}")
        return
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    table = []
    for lengths in args.lengths:
        for rows in args.rows:
            for engine in args.engines:
                table.append(run(args, engine, rows, lengths))
                print(f"| {' | '.join(map(str, table[-1]))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in table], indent=1))


if __name__ == "__main__":
    main()
