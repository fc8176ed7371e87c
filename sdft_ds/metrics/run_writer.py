"""Writes metrics.jsonl and run.json to the run folder, in the format of metrics/run_folder.py."""

import json
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.checkpoint.resume_settings import versions
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.files import atomic_write
from sdft_ds.model.completion_forward import causal_lm_of


class RunWriter(TrainerCallback):
    """Writes on rank 0 only. method: sdft, or the baseline's name; model: its name or folder."""

    def __init__(self, method: str, model: str):
        self.method = method
        self.model = model
        self.about: dict[str, Any] | None = None  # None until a run begins
        self.lines_before: list[dict[str, Any]] = []  # logged before a run begins, e.g. by an initial evaluation

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir, "run.json")
        before = json.loads(file.read_text()) if state.global_step > 0 and file.exists() else {}
        self.about = {
            "method": self.method,
            "model": self.model,
            "quantization": _quantization(kwargs["model"]),
            "config": args.to_dict(),
            "versions": versions(),
            "environment": environment(args),
            "started": before.get("started") or time.time(),
            "finished": None,
        }
        if state.global_step >= state.max_steps and before:  # nothing left to train: keep the record of the training
            self.about = before
        self._write(args)
        for line in self.lines_before if state.global_step == 0 else []:
            self._append(args, line)
        self.lines_before = []

    def on_log(
        self, args: SDFTConfig, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **logs}
            if self.about is None:
                self.lines_before.append(line)
            else:
                self._append(args, line)

    def on_train_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.about["finished"] = self.about["finished"] or time.time()
            self._write(args)

    def _append(self, args: SDFTConfig, line: dict[str, Any]) -> None:
        with open(Path(args.output_dir, "metrics.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")

    def _write(self, args: SDFTConfig) -> None:
        with atomic_write(Path(args.output_dir, "run.json")) as aside:
            aside.write_text(json.dumps(self.about, indent=1, default=str))


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """How the model's weights are quantized, as from_dict of its configuration takes it."""
    found = getattr(causal_lm_of(model).config, "quantization_config", None)
    return found.to_dict() if hasattr(found, "to_dict") else found


def environment(args: SDFTConfig) -> dict[str, Any]:
    """Host, device and software of a run, and its SLURM job, if any."""
    device = args.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    found = {
        "host": socket.gethostname(),
        "accelerator": f"{device.type}: {name}",
        "world_size": args.world_size,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return found | {name: os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name in os.environ}
