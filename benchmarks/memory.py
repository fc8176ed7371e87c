"""What a teacher costs in memory: peak per rank of a base and an EMA teacher above a live one, and TRL's beside it.

    python -m benchmarks.small_models FOLDER
    python -m benchmarks.memory --model FOLDER [--stages 2 3] [--json FILE]     the benchmark extra installs TRL 1.16

Full fine-tuning on two CPU ranks in fp32, the same rows and lengths for both. The peak is the largest resident set of
a rank over the second and third optimizer step: the kernel's high-water mark, reset after the first. The allocator is
told to give large blocks back at once, so that what was freed does not count.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sdft_ds.distributed.launch import free_port

CONFIGS = Path(__file__).parents[1] / "ds_configs"
KINDS = ["live", "base", "ema"]
SETTINGS = {
    "max_steps": 3, "per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 16,
    "max_prompt_length": 96, "bf16": False, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 1, "distillation_alpha": 0.0, "learning_rate": 1e-5,
}  # fmt: skip


def status(field: str) -> int:
    """A field of this process's memory status, in MB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) // 1024


def cell(tool: str, stage: int, kind: str, model: str) -> None:
    """One rank of one run; prints its figures, in MB, as the last line: see `run`."""
    import deepspeed
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    deepspeed.init_distributed("gloo", verbose=False)
    if tool == "trl":
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    else:
        from sdft_ds import SDFTConfig, SDFTTrainer

    figures = {}

    class Peak(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            if state.global_step == state.max_steps:
                figures.update(peak_mb=status("VmHWM"), between_steps_mb=status("VmRSS"), tensors_mb=tensors_mb())

    def tensors_mb() -> int:
        tensors = [
            thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"
        ]
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return sum(storages.values()) >> 20

    prompt = [{"role": "user", "content": "Name the capital of France, and say why it matters. " * 4}]
    dataset = Dataset.from_list([{"prompt": prompt, "privileged_context": "The capital is Paris. " * 8}] * 8)
    named = {"teacher_update_rate": 0.05, "teacher_sync_steps": 1} if kind == "ema" else {}
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(), deepspeed=str(CONFIGS / f"zero{stage}.json"), teacher_model_kind=kind,
        activation_checkpointing=True, **SETTINGS, **named,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    figures["before_model_mb"] = status("VmRSS")
    trainer = SDFTTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[Peak()]
    )  # fmt: skip
    trainer.train()
    print(json.dumps(figures), flush=True)


def run(tool: str, stage: int, kind: str, model: str) -> dict[str, int] | str:
    """Figures of the rank with the larger peak, in MB, or the last line of the error.

    peak_mb: its largest resident set. before_model_mb: the resident set before a model is made: the interpreter and
    the libraries. between_steps_mb, tensors_mb: after the last step, the resident set, and all tensors that are alive.
    """
    port = free_port()
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu",
            "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.memory", "--model", model, "--cell", tool, str(stage), kind]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=600) for process in ranks]
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.kill()
        return "no end within 10 minutes"
    for process, (_, errors) in zip(ranks, outputs, strict=True):
        if process.returncode:
            return next((line for line in reversed(errors.splitlines()) if "Error" in line), "failed")[:120]
    return max((json.loads(out.splitlines()[-1]) for out, _ in outputs), key=lambda figures: figures["peak_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="ZeRO stages")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        tool, stage, kind = args.cell
        cell(tool, int(stage), kind, args.model)
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(args.model)
    import torch

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    parameters = sum(param.numel() for param in meta.parameters())
    head = meta.get_output_embeddings().weight.numel()
    allowed = 1.1 * (4 * parameters / 2 + 4 * head + 4 * 2 * 16 * config.hidden_size) / 1e6
    figures = {}
    print("| ZeRO | teacher | sdft_ds peak, MB | above live | allowed | TRL 1.16 peak, MB | above live |")
    print("|---|---|---|---|---|---|---|")
    for stage in args.stages:
        for kind in KINDS:
            for tool in ("ours", "trl"):
                found = run(tool, stage, kind, args.model)
                figures[tool, stage, kind] = found if isinstance(found, str) else found["peak_mb"]
            row = [str(stage), kind]
            for tool in ("ours", "trl"):
                peak, live = figures[tool, stage, kind], figures[tool, stage, "live"]
                both = isinstance(peak, int) and isinstance(live, int)
                row += [str(peak), f"{peak - live:+d}" if both and kind != "live" else ""]
                row += [f"{allowed:.0f}" if kind != "live" else ""] if tool == "ours" else []
            print("| " + " | ".join(row) + " |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"/".join(map(str, key)): value for key, value in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
