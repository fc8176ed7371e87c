"""What this machine is: versions, the names that the sources take from torch, the doctor's lines, and its speed."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import sdft_ds
from benchmarks.gpu import models, timing
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.per_token import per_token, prompts_of, way
from benchmarks.gpu.processes import call
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.sources import missing_names, unimportable
from sdft_ds.doctor.__main__ import all_checks, examine
from sdft_ds.doctor.checks import FAIL

PACKAGES = ["sdft_ds", "torch", "transformers", "deepspeed", "accelerate", "peft", "datasets", "triton",
            "bitsandbytes", "liger-kernel", "flash-attn", "vllm"]  # fmt: skip


def run(setup: Setup, findings: Findings) -> None:
    findings.figure("versions", {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}})
    own = _version("sdft_ds")
    findings.check("sdft_ds is installed: a run records its version", own != "not installed", own)
    _device(setup, findings)
    missing = missing_names(Path(sdft_ds.__file__).parent)
    findings.check("this torch has every name that the sources take from it", not missing, missing or "")
    broken = unimportable()
    findings.check("every module imports", not broken, broken or "")
    for name, check in all_checks(Path(setup.out)).items():
        if name != "operators":  # which may take minutes to build
            found = examine(check)
            findings.check(f"doctor: {name}", found.status != FAIL or name == "packages", found.found)
    speed = host_speed() if setup.tiny else next(iter(call(_host_speed, setup=setup, on_cpu=True)))
    findings.figure("host: ms per token of 28 narrow layers, one thread", speed)
    _speed(setup, findings)
    findings.say(f"torch {torch.__version__}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(setup: Setup, findings: Findings) -> None:
    if not setup.on_gpu:
        findings.skip("the GPU's facts", "need CUDA")
        return
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    findings.figure("GPU", {
        "name": properties.name, "GB": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count, "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(), "driver": driver,
        "GPUs": torch.cuda.device_count(), "CPU cores": os.cpu_count(),
    })  # fmt: skip


def host_speed() -> float:
    torch.set_num_threads(1)
    model = models.make("narrow")
    return per_token(way("sdft_ds", model), prompts_of(2, 24, padded=True), (4, 24))["ms/token"]


def _host_speed():
    yield host_speed()


def _speed(setup: Setup, findings: Findings) -> None:
    """Of a copy, bytes read and written counted, and of a product of matrices."""
    dtype = torch.bfloat16 if setup.on_gpu else torch.float32
    size = setup.sized(8192, 256)
    left, right = (torch.randn(size, size, device=setup.device, dtype=dtype) for _ in range(2))
    findings.figure("TFLOP/s of a product", 2 * size**3 / timing.median_seconds(lambda: left @ right) / 1e12)
    source = torch.empty(setup.sized(2**31, 2**20), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    seconds = timing.median_seconds(lambda: target.copy_(source))
    findings.figure("GB/s of a copy", 2 * source.nbytes / seconds / 1e9)
