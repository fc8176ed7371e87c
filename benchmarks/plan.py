"""What sdft_ds.plan says against what a rank really takes: full fine-tuning on two CPU ranks in fp32.

    python -m benchmarks.small_models FOLDER
    python -m benchmarks.plan --model FOLDER [--stages 2 3] [--kinds live ema]

Predicted are tensors. What a process holds before there is a model (interpreter, libraries) is measured and added.
What is left between two steps above those and the tensors that are alive then is the allocator's, and what libraries
keep for themselves; it is not predicted, and stands in a column of its own.
"""

import argparse

from benchmarks.memory import SETTINGS, run
from sdft_ds.plan.footprint import footprint
from sdft_ds.plan.job import SETUPS, Job
from sdft_ds.plan.model_shape import ModelShape, load_shape


def job(shape: ModelShape, kind: str) -> Job:
    """The job that benchmarks.memory runs; its teacher's prompts are below 192 tokens."""
    return Job(
        shape=shape,
        ranks=2,
        teacher=kind,
        bf16=SETTINGS["bf16"],
        batch=SETTINGS["per_device_train_batch_size"],
        generations=SETTINGS["num_generations"],
        prompt=SETTINGS["max_prompt_length"],
        teacher_prompt=192,
        completion=SETTINGS["max_completion_length"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--kinds", nargs="+", default=["live", "ema"], help="kinds of teacher")
    args = parser.parse_args()
    shape = load_shape(args.model)
    print(
        "| ZeRO | teacher | tensors, predicted | in phase | before the model | predicted peak | measured peak ", end=""
    )
    print("| off by | allocator and libraries |\n|---|---|---|---|---|---|---|---|---|")
    for stage in args.stages:
        for kind in args.kinds:
            found = footprint(job(shape, kind), SETUPS[stage])
            measured = run("ours", stage, kind, args.model)
            if isinstance(measured, str):
                raise SystemExit(f"ZeRO-{stage}, {kind}: {measured}")
            tensors, before, peak = found.peak / 2**20, measured["before_model_mb"], measured["peak_mb"]
            rest = measured["between_steps_mb"] - before - measured["tensors_mb"]
            off = (tensors + before) / peak - 1
            row = [stage, kind, f"{tensors:.0f}", found.peak_phase, before, f"{tensors + before:.0f}", peak]
            print("| " + " | ".join(map(str, [*row, f"{off:+.1%}", rest])) + " |", flush=True)


if __name__ == "__main__":
    main()
