"""Rollouts by vLLM in the training process beside local ones, by benchmarks.rollouts, where vLLM is installed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import ROOT, Setup
from tests.helpers import tiny


def run(setup: Setup, findings: Findings) -> None:
    if find_spec("vllm") is None:
        findings.skip("vLLM", "needs vllm (pip install 'sdft_ds[vllm]')")
        return
    folder = Path(setup.out, "vllm")
    models.make("small", dtype=torch.bfloat16 if setup.on_gpu else torch.float32).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    flags = ["--engines", "local", "colocate", "--rows", "8", "--tokens", setup.sized("64", "8"), "--lengths", "even"]
    flags += ["--json", str(folder / "figures.json"), "--steps", "4", *(["--bf16"] if setup.on_gpu else [])]
    command = [sys.executable, "-m", "benchmarks.rollouts", "--model", str(folder / "model"), *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    figures = {row.pop("engine"): row for row in json.loads((folder / "figures.json").read_text())}
    findings.figure("by engine", figures)
    findings.check("both engines train", set(figures) == {"local", "colocate"})
    findings.say(f"{figures['colocate']['tokens/s']} tokens/s, local {figures['local']['tokens/s']}")
