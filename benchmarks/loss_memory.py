"""Peak memory of the loss, forward and backward, from hidden states and a head: this project's and TRL 1.16's.

    python -m benchmarks.loss_memory [--sizes 256x49152 2048x49152 ...] [--dtype bfloat16] [--json FILE]
                                                                       the benchmark extra installs TRL 1.16

N tokens, V vocabulary, hidden size 576. Both start from the same hidden states of student and teacher and the same
head, and end with the gradients of the student's hidden states and of the head. The figure is the peak above the
inputs and those two gradients, which come out of either. TRL's side projects all logits and calls its loss functions.
On a GPU it is what was allocated; on a CPU the high-water mark of a process's resident memory, of one process for each
figure, whose allocator gives large blocks back at once.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HIDDEN = 576
SIZES = ["256x49152", "2048x49152", "8192x49152", "256x152064", "2048x152064", "8192x152064"]
PATHS = ["sdft_ds full", "sdft_ds top-100", "TRL full", "TRL top-100"]


def cell(path: str, n: int, v: int, dtype: torch.dtype) -> int:
    """Peak bytes above inputs and gradients."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    student = torch.randn(n, HIDDEN, device=device, dtype=dtype).requires_grad_()
    teacher = torch.randn(n, HIDDEN, device=device, dtype=dtype)
    head = (torch.randn(v, HIDDEN, device=device, dtype=dtype) / HIDDEN**0.5).requires_grad_()
    tokens = torch.randint(v, (n,), device=device)
    loss_of = _ours if path.startswith("sdft_ds") else _trl
    loss_of(student[:2].detach().requires_grad_(), teacher[:2], head[:200].detach(), tokens[:2] % 200, path).backward()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
    loss = loss_of(student, teacher, head, tokens, path)
    loss.backward()
    if not loss.isfinite():
        raise RuntimeError(f"{path}: the loss is {loss.item()}.")
    peak = torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")
    return peak - before - sum(t.grad.numel() * t.grad.element_size() for t in (student, head))


def _status(field: str) -> int:
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


def _ours(student, teacher, head, tokens, path):
    from sdft_ds.loss.chunked import HeadValues, LossTerms, chunked_distillation_loss
    from sdft_ds.loss.divergence import Divergence

    mode = {"mode": "topk_logits", "topk": 100} if "top" in path else {"mode": "full_logits"}
    terms = LossTerms(
        Divergence(alpha=0.5, **mode), teacher, None, tokens, torch.ones(len(tokens), device=head.device)
    )
    scale = torch.tensor(1.0 / len(tokens), device=head.device)
    return chunked_distillation_loss(student, HeadValues(head), terms, scale, lambda logits: logits)[0]


def _trl(student, teacher, head, tokens, path):
    from trl.experimental.sdft import loss_utils

    student_logits = student @ head.T
    with torch.no_grad():
        teacher_logits = teacher @ head.T
    if "top" in path:
        loss = loss_utils.compute_topk_self_distillation_loss(
            student_logits, teacher_logits, distillation_topk=100, distillation_alpha=0.5, distillation_add_tail=False
        )
    else:
        loss = loss_utils.compute_full_logit_self_distillation_loss(
            student_logits, teacher_logits, distillation_alpha=0.5
        )
    return loss.mean()


def run(path: str, size: str, dtype: str) -> int | None:
    """MB of one cell in a process of its own; None where it did not fit."""
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.loss_memory", "--dtype", dtype, "--cell", path, size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode in (-9, 137) or "memory" in last.lower():
            return None
        raise RuntimeError(f"{path} at {size}: {last}")
    return int(done.stdout.splitlines()[-1]) // 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="N x V")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PATH@SIZE", help="cells that would not fit")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        path, size = args.cell
        print(cell(path, *map(int, size.split("x")), getattr(torch, args.dtype)))
        return
    figures = {}
    print("| N x V | " + " | ".join(f"{path}, MB" for path in PATHS) + " |")
    print("|---" * (len(PATHS) + 1) + "|")
    for size in args.sizes:
        for path in PATHS:
            figures[path, size] = None if f"{path}@{size}" in args.skip else run(path, size, args.dtype)
        row = [figures[path, size] for path in PATHS]
        print(f"| {size} | " + " | ".join("does not fit" if mb is None else str(mb) for mb in row) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"/".join(key): value for key, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
