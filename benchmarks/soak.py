"""Kills a two-rank run at random moments, resumes it each time, and compares its end with that of an unbroken run.

    python -m benchmarks.soak [--kills 50] [--steps 1500] [--stage 2] [--within 10] [--seed 0]

A tiny Llama with an EMA teacher under ZeRO-2, a checkpoint every 10 steps. Each time one rank or both get SIGKILL some
seconds after their start, wherever they are: importing, rolling out, training, or in the middle of a save. The run
must end with the same losses, weights and teacher, bit by bit. Processes are forked from one that has imported
everything, which saves the start-up of each.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from sdft_ds.distributed.launch import free_port
from tests.faults import program
from tests.faults.runs import end

RANKS = 2


def rank_main(rank: int, port: int, folder: str, settings: dict) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = open(f"{folder}/rank-{rank}.log", "a", buffering=1)
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    program.main(folder, dict(settings))


def start(folder: Path, settings: dict) -> list:
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [context.Process(target=rank_main, args=(r, port, str(folder), settings)) for r in range(RANKS)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list, seconds: float) -> list[int]:
    """Exit codes; raises RuntimeError where a rank hangs."""
    given_up = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, given_up - time.monotonic()))
    if any(process.is_alive() for process in processes):
        for process in processes:
            process.kill()
        raise RuntimeError(f"A rank did not end within {seconds:.0f} s.")
    return [process.exitcode for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--within", type=float, default=10.0, help="seconds of a start within which it is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random_numbers = random.Random(args.seed)
    settings = {
        "stage": args.stage, "max_steps": args.steps, "save_strategy": "steps", "save_steps": 10,
        "save_total_limit": 3, "teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.05,
        "learning_rate": 1e-3, "steps_per_generation": 2, "num_iterations": 2, "resume": True, "ddp_timeout": 20,
    }  # fmt: skip
    whole, broken = (Path(tempfile.mkdtemp(prefix=f"soak-{name}-")) for name in ("whole", "broken"))
    codes = finish(start(whole, settings), 1800)
    if any(codes):
        raise RuntimeError(f"The unbroken run ended with {codes}; see {whole}.")
    kills = 0
    while kills < args.kills:
        processes = start(broken, settings)
        time.sleep(random_numbers.uniform(1.0, args.within))
        victims = random_numbers.choice([processes[:1], processes[1:], processes])
        alive = [process for process in victims if process.is_alive()]
        for process in alive:
            os.kill(process.pid, signal.SIGKILL)
        codes = finish(processes, 120)
        if codes == [0] * RANKS:
            break  # it had ended before
        kills += bool(alive)
        steps = sorted(int(path.name.split("-")[1]) for path in broken.glob("checkpoint-*"))
        print(f"kill {kills}: exit codes {codes}, checkpoints {steps}", flush=True)
    if not (broken / "end-of-rank-0.json").exists():
        codes = finish(start(broken, settings), 1800)
        if any(codes):
            raise RuntimeError(f"The last resume ended with {codes}; see {broken}.")
    for rank in range(RANKS):
        if end(broken, rank) != end(whole, rank):
            raise RuntimeError(f"Rank {rank} ended elsewhere than in the unbroken run: {broken}, {whole}.")
    print(
        f"{kills} kills and resumes: losses, weights and teacher are those of the unbroken run of {args.steps} steps."
    )


if __name__ == "__main__":
    main()
