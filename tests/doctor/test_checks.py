"""Each check sees what is there, and names the remedy for what is not, on real processes, compilers and files."""

import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path

import pytest
import torch

from sdft_ds.doctor import checks
from sdft_ds.doctor.checks import FAIL, OK, WARN

ROOT = Path(__file__).parents[2]
GIB = 2**30
on_a_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="what is said where there is no accelerator")


@pytest.fixture
def variables(monkeypatch):
    """Sets environment variables; none that a check reads is set before."""
    for name in [*os.environ]:
        if name.startswith("SLURM_") or (checks.VARIABLES.fullmatch(name) and name != "TORCH_EXTENSIONS_DIR"):
            monkeypatch.delenv(name)

    def give(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return give


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name


@pytest.mark.parametrize("version, status", [((3, 10, 9), FAIL), ((3, 11, 0), OK), ((3, 14, 1), WARN)])
def test_python(version, status):
    assert checks.python(version).status == status


def versions() -> dict[str, str]:
    return dict(line.split("==") for line in checks.TESTED.read_text().splitlines()[1:])


def test_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(name, version):
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    for name in versions().keys() - checks.DEVELOPMENT:
        install(name, versions()[name])
    install("torch", versions()["torch"] + "+cu128")
    assert checks.packages().status == OK
    install("tqdm", "1.0")
    finding = checks.packages()
    assert finding.status == WARN and finding.found == f"tqdm 1.0 (tested: {versions()['tqdm']})"
    shutil.rmtree(tmp_path / "peft.dist-info")
    finding = checks.packages()
    assert finding.status == FAIL and finding.found.startswith("missing: peft; tqdm 1.0")
    assert finding.remedy == f"pip install peft=={versions()['peft']}"


def test_all_that_a_run_needs_is_looked_for_and_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {name.split(">")[0].lower() for name in project["project"]["dependencies"]}
    assert needed <= {name.lower() for name in versions().keys() - checks.DEVELOPMENT}
    assert checks.TESTED.name in project["tool"]["setuptools"]["package-data"]["sdft_ds"]


@on_a_cpu
def test_accelerator(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.accelerator().status == WARN and "no GPU" in checks.accelerator().found
    program(tmp_path, "nvidia-smi", "true")
    assert checks.accelerator().status == FAIL and "CUDA" in checks.accelerator().remedy


@on_a_cpu
@pytest.mark.parametrize(
    "flags, status", [("fpu avx512_bf16", OK), ("asimd bf16", OK), ("fpu avx2", WARN), (None, WARN)]
)
def test_bf16(tmp_path, flags, status):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    finding = checks.bf16(tmp_path / "cpuinfo")
    assert finding.status == status and ("--bf16 false" in finding.remedy) == (status == WARN)


class TestOperators:
    @on_a_cpu
    @pytest.mark.full  # it takes minutes the first time
    def test_built(self):
        assert checks.operators().status == OK

    @on_a_cpu
    def test_no_compiler(self, variables, tmp_path):
        variables(PATH=tmp_path, TORCH_EXTENSIONS_DIR=tmp_path)
        os.symlink("/bin/bash", tmp_path / "bash")
        finding = checks.operators()
        assert finding.status == WARN and "without" in finding.found and "c++" in finding.found
        assert "g++" in finding.remedy

    @on_a_cpu
    def test_no_ninja(self, variables, tmp_path):
        """Another environment with the same packages, and no programs in it."""
        venv.create(tmp_path / "bare")
        [packages] = (tmp_path / "bare").glob("lib/*/site-packages")
        (packages / "same.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        program(tmp_path / "bin", "c++", "exec /usr/bin/c++")
        os.symlink("/bin/bash", tmp_path / "bin" / "bash")
        variables(PATH=tmp_path / "bin", PYTHONPATH=ROOT)
        found = subprocess.run(
            [tmp_path / "bare/bin/python", "-c", "from sdft_ds.doctor import checks; print(checks.operators())"],
            check=True, capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
        assert "status='warn'" in found and 'without ninja"' in found and "remedy='pip install ninja" in found

    @on_a_cpu
    def test_a_compiler_that_lacks_a_header(self, variables, tmp_path):
        compiler = program(tmp_path, "c++", 'exec /usr/bin/c++ -nostdinc "$@"')
        variables(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path)
        finding = checks.operators()
        assert finding.status == WARN and finding.found.endswith("No such file or directory")

    @on_a_cpu
    @pytest.mark.full
    def test_a_slow_build_is_ended_and_leaves_no_lock(self, variables, tmp_path):
        wait = f'case "$*" in *" -c "*) touch {tmp_path}/begun; sleep 600;; esac'
        compiler = program(tmp_path, "c++", f'{wait}\nexec /usr/bin/c++ "$@"')
        variables(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path / "extensions")
        finding = checks.operators(limit=60)
        assert finding.status == WARN and "not built after 60 s" in finding.found
        assert (tmp_path / "begun").exists() and not [*(tmp_path / "extensions").rglob("lock")]

    @on_a_cpu
    @pytest.mark.full
    def test_a_lock_that_a_killed_build_left(self, variables, tmp_path):
        (tmp_path / "cpu_adam").mkdir()
        (tmp_path / "cpu_adam" / "lock").touch()
        variables(TORCH_EXTENSIONS_DIR=tmp_path)
        finding = checks.operators(limit=8)
        assert finding.status == WARN and f"remove {tmp_path}/cpu_adam/lock" in finding.remedy


class TestCommunication:
    def test_all_reduce(self, variables):
        assert checks.communication().status == OK

    @on_a_cpu
    def test_no_such_interface(self, variables):
        variables(GLOO_SOCKET_IFNAME="nowhere0")
        finding = checks.communication()
        assert finding.status == FAIL and "nowhere0" in finding.found and "GLOO_SOCKET_IFNAME" in finding.remedy

    def test_time_limit(self, variables):
        start = time.monotonic()
        finding = checks.communication(limit=0.2)
        assert finding.status == FAIL and "within 0.2 s" in finding.found
        assert time.monotonic() - start < 30


@pytest.mark.parametrize("available, status", [(16, OK), (2, WARN), (0.5, FAIL)])
def test_memory(tmp_path, available, status):
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {int(available * 2**20)} kB\n")
    finding = checks.memory(tmp_path / "meminfo", tmp_path)
    assert finding.status == status and finding.found == f"{available:.1f} GiB free"


def test_memory_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text(f"MemAvailable: {16 * 2**20} kB\n")
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    assert checks.memory(tmp_path / "meminfo", tmp_path).found == "2.0 GiB free"
    (tmp_path / "memory.max").write_text("max\n")
    assert checks.memory(tmp_path / "meminfo", tmp_path).found == "16.0 GiB free"


def test_memory_where_the_system_does_not_say(tmp_path):
    assert checks.memory(tmp_path / "meminfo").status == WARN


def test_disk(tmp_path):
    assert f"free in {tmp_path}" in checks.disk(tmp_path / "not" / "yet").found
    assert not [*tmp_path.iterdir()]
    finding = checks.disk(Path("/proc/runs"))
    assert finding.status == FAIL and "/proc cannot be written" in finding.found and "--output_dir" in finding.remedy


def test_shared_memory(tmp_path):
    assert "GiB free in" in checks.shared_memory(tmp_path).found
    assert checks.shared_memory(tmp_path / "none").status == WARN


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    != 0,
    reason="only root may mount a small file system",
)
@pytest.mark.parametrize(
    "check, size, status",
    [
        ("shared_memory", 64, WARN),
        ("shared_memory", 2048, OK),
        ("disk", 64, FAIL),
        ("disk", 2048, WARN),
        ("disk", 40960, OK),
    ],
)
def test_a_small_file_system(check, size, status):
    run = f"from sdft_ds.doctor import checks; from pathlib import Path; print(checks.{check}(Path('/mnt')))"
    mount = f'mount -t tmpfs -o size={size}m none /mnt && exec "$0" -c "{run}"'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", mount, sys.executable], cwd=ROOT, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert f"status='{status}', found='{size / 1024:.1f} GiB free in /mnt'" in done.stdout


class TestSlurm:
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": 4}

    def test_no_job(self, variables):
        assert checks.slurm() == checks.Finding(OK, "not in a job")

    def test_a_job_is_shown(self, variables, tmp_path):
        program(tmp_path, "scontrol", "true")
        variables(**self.job, PATH=tmp_path)
        assert checks.slurm().status == OK
        assert checks.slurm().found.startswith("job 7: 2 nodes (n[1-2]), 4 tasks, 0 GPUs")

    def test_fewer_gpus_than_slurm_gave(self, variables):
        variables(**self.job, MASTER_ADDR="n1", SLURM_GPUS_ON_NODE=99)
        assert checks.slurm().status == FAIL and "--gpus-per-node" in checks.slurm().remedy

    def test_uneven_tasks(self, variables):
        variables(**{**self.job, "SLURM_NTASKS": 3}, MASTER_ADDR="n1")
        assert checks.slurm().status == FAIL and "--ntasks-per-node" in checks.slurm().remedy

    def test_nobody_knows_the_first_node(self, variables, tmp_path):
        variables(**self.job, PATH=tmp_path)
        assert checks.slurm().status == FAIL and "MASTER_ADDR" in checks.slurm().remedy


class TestEnvironment:
    def test_what_matters_is_shown(self, variables, monkeypatch):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
        assert checks.environment() == checks.Finding(OK, "none that matters is set")
        variables(HF_HUB_OFFLINE=1, NCCL_DEBUG="INFO", HF_TOKEN="secret", MASTER_ADDR="127.0.0.1")
        assert checks.environment() == checks.Finding(OK, "HF_HUB_OFFLINE=1, MASTER_ADDR=127.0.0.1, NCCL_DEBUG=INFO")

    def test_an_address_that_nobody_has(self, variables):
        variables(MASTER_ADDR="nobody.invalid")
        assert checks.environment().status == FAIL and "MASTER_ADDR" in checks.environment().remedy

    @pytest.mark.parametrize("values", [{"OMP_NUM_THREADS": 9999}, {"DS_ACCELERATOR": "npu"}])
    def test_what_does_not_fit_this_machine(self, variables, values):
        variables(**values)
        assert checks.environment().status == WARN and [*values][0] in checks.environment().remedy
