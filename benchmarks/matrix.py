"""Which settings train, and are right: every ZeRO stage x full/LoRA/QLoRA x teacher x checkpointing x ranks x dtype.

    python -m benchmarks.matrix [--only STAGE] [--json FILE]        about half an hour on 2 CPU cores

Each cell trains a tiny Llama for three steps on real engines. Its losses must be those of one process without
DeepSpeed with the same adapter, teacher and dtype: within 1e-4 in fp32; in bf16 the first one within 5 % and all of
them finite. There, another number of rows can change the rounding of a product and so move a draw across the border of
two tokens: if completions of the first step differ, within 25 %. Prints the table of the README, and what CPU it was
made on: torch and bitsandbytes have other kernels where there are bf16 units.
"""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

STAGES = ["none", "zero0", "zero1", "zero2", "zero3", "zero3_offload_optimizer", "zero3_offload"]
ADAPTERS = ["full", "LoRA", "QLoRA"]
KINDS = ["live", "base", "ema"]
Found = tuple[list[float], list[list[int]]]  # what a cell returns


def cell(stage: str, adapter: str, kind: str, checkpointing: bool, bf16: bool, folder: str) -> Found:
    """The losses of three steps, and the completions of the first one on all ranks."""
    import torch
    from transformers import BitsAndBytesConfig

    from sdft_ds.distributed import ranks
    from tests.helpers.trainers import DS_CONFIGS, Recorder, make_trainer

    settings = {"teacher_model_kind": kind, "activation_checkpointing": checkpointing, "bf16": bf16}
    settings |= {"teacher_sync_steps": 1, "per_device_train_batch_size": 4 // torch_world_size()}
    if stage != "none":
        settings["deepspeed"] = str(DS_CONFIGS / f"{stage}.json")
    if adapter == "QLoRA":
        storage = torch.bfloat16 if bf16 else torch.float32
        settings["model_init_kwargs"] = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=storage,
                bnb_4bit_quant_storage=storage,
            )
        }
    recorder = Recorder()
    trainer = make_trainer(
        None, lora=adapter != "full", model=folder if adapter == "QLoRA" else None, callbacks=[recorder], **settings
    )
    trainer.train()
    losses = [log["loss"] for log in recorder.logs if "loss" in log]
    padded = [row for of_rank in ranks.all_gather_objects(recorder.completions[0]) for row in of_rank]
    return losses, [[token for token in row if token != trainer.prompts.tokenizer.pad_token_id] for row in padded]


def pairwise(factors: list[list]) -> list[tuple]:
    """Cells, one value of each factor, chosen greedily until every pair of values of two factors stands in one."""
    cells = list(itertools.product(*factors))
    missing = set().union(*map(pairs_of, cells))
    chosen = []
    while missing:
        best = max(cells, key=lambda candidate: len(pairs_of(candidate) & missing))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(chosen: tuple) -> set[tuple]:
    return {((i, chosen[i]), (j, chosen[j])) for i, j in itertools.combinations(range(len(chosen)), 2)}


def save_tiny(folder: str) -> None:
    """The tiny Llama and its tokenizer, for cells that load what they quantize."""
    from tests.helpers import tiny

    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def torch_world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def is_right(found: Found, reference: Found, bf16: bool, within: float = 1e-4) -> bool:
    """within: share by which losses in fp32 may differ."""
    (losses, completions), (expected, sampled) = found, reference
    if not all(map(math.isfinite, losses)):
        return False
    if not bf16:
        return all(abs(a - b) <= within * abs(b) + 1e-6 for a, b in zip(losses, expected, strict=True))
    share = 0.05 if sorted(completions) == sorted(sampled) else 0.25
    return abs(losses[0] - expected[0]) <= share * abs(expected[0]) + 1e-3


def main() -> None:
    import torch

    from sdft_ds.doctor import checks
    from tests.distributed.ranks import RankError, Ranks

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, action="append", help="these stages only")
    parser.add_argument("--json", type=Path, help="write every cell's outcome here")
    args = parser.parse_args()

    os.environ["PYTHONWARNINGS"] = "ignore"  # deprecations inside the libraries, once for each of 500 cells
    folder = tempfile.mkdtemp()
    save_tiny(folder)
    workers = {1: Ranks(1), 2: Ranks(2)}
    started, outcomes, references = time.time(), [], {}

    def run(world_size, *settings):
        return workers[world_size].run(cell, *settings, folder, timeout=120)[0]

    for stage, adapter in itertools.product(args.only or STAGES, ADAPTERS):
        for kind, checkpointing, ranks, bf16 in itertools.product(KINDS, (False, True), (1, 2), (False, True)):
            key = (adapter, kind, bf16)
            if key not in references:
                references[key] = run(1, "none", adapter, kind, False, bf16)
            try:
                found = run(ranks, stage, adapter, kind, checkpointing, bf16)
                right = is_right(found, references[key], bf16)
                error = None if right else f"found {found}, reference {references[key]}"
            except RankError as raised:
                right, error = False, str(raised)
            outcome = dict(
                stage=stage, adapter=adapter, kind=kind, checkpointing=checkpointing, ranks=ranks, bf16=bf16
            )
            outcomes.append({**outcome, "right": right, "error": error})
            if not right:
                print("not right:", outcome, error[-600:], file=sys.stderr)
        print(f"{stage} {adapter}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    for ranks in workers.values():
        ranks.stop()
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=1))

    print("\nCells that are right, of 24 each (3 teachers x checkpointing off/on x 1/2 ranks x fp32/bf16)\n")
    print("| | " + " | ".join(ADAPTERS) + " |")
    print("|---|" + "---|" * len(ADAPTERS))
    for stage in args.only or STAGES:
        counts = [[o["right"] for o in outcomes if (o["stage"], o["adapter"]) == (stage, a)] for a in ADAPTERS]
        print(f"| {stage} | " + " | ".join(f"{sum(c)}/{len(c)}" for c in counts) + " |")
    print(f"\n{sum(o['right'] for o in outcomes)} of {len(outcomes)} in {time.time() - started:.0f} s")
    print(f"{torch.backends.cpu.get_cpu_capability()}; {checks.bf16().found}")


if __name__ == "__main__":
    main()
