"""The package as it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


def test_an_editable_install_is_found_beside_its_clone(tmp_path):
    """In the folder that holds a clone named sdft_ds: that folder is not taken for a namespace package."""
    pytest.importorskip("setuptools", minversion="77")
    clone, installed = tmp_path / "sdft_ds", tmp_path / "site"
    (clone / "sdft_ds").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "sdft_ds/__init__.py"):
        shutil.copy(ROOT / name, clone / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def python(program, cwd, *options):
        command = [sys.executable, *options, "-c", program]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    build = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    wheel = python(build, clone)[-1]
    zipfile.ZipFile(tmp_path / wheel).extractall(installed)
    program = f"import site; site.addsitedir({str(installed)!r}); import sdft_ds; print(sdft_ds.__file__)"
    # -S: without the packages of the environment, in which another copy of this one is installed.
    assert python(program, tmp_path, "-S") == [str(clone / "sdft_ds" / "__init__.py")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source distribution, of a copy of the repository without what it ignores."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, folder / "clone", ignore=ignored)
    build = "from setuptools import build_meta as b; print(b.build_wheel('..'), b.build_sdist('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder / "clone", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [folder / name for name in done.stdout.splitlines()[-1].split()]


@pytest.mark.full
def test_a_wheel_has_the_package_and_what_it_reads(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sdft_ds"}
    found = {name.removeprefix("sdft_ds/") for name in names if name.startswith("sdft_ds/")}
    kept = (path for path in (ROOT / "sdft_ds").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {str(path.relative_to(ROOT / "sdft_ds")) for path in kept}
    assert found == expected | {f"ds_configs/{path.name}" for path in (ROOT / "ds_configs").glob("*.json")}


@pytest.mark.full
def test_a_source_distribution_has_what_a_wheel_and_a_launch_need(built):
    names = [name.partition("/")[2] for name in tarfile.open(built[1]).getnames()]
    wanted = [
        "setup.py", "LICENSE", "ds_configs/zero2.json", "launch/quickstart.sh", "launch/slurm/train.sbatch",
        "sdft_ds/constraints.txt", "sdft_ds/report/page.css", "sdft_ds/demo/model/model.safetensors",
    ]  # fmt: skip
    assert set(wanted) <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "build")) or "__pycache__" in name]


@pytest.mark.full
def test_every_command_runs_from_a_wheel_in_an_empty_folder(built, tmp_path):
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    tiny.llama().save_pretrained(work / "model")
    tiny.tokenizer().save_pretrained(work / "model")
    rows = [{"prompt": f"Question {i}", "golden_response": f"Answer {i}"} for i in range(4)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--model_name_or_path", "model", "--dataset_path", "rows.jsonl", "--max_completion_length", "8"]

    def run(name, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"sdft_ds.{name}", *arguments]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--bf16", "false", "--save_strategy", "no"]
    for config, out in (("zero2", "named"), ("ds_configs/zero2.json", "in a clone's words")):
        run("train", *data, *lora, "--deepspeed", config, "--max_steps", "2", "--output_dir", out)
    assert "tokens of a greedy answer are the same" in run("merge", "named", "merged")
    assert "report.html" in run("report", "named")
    run("preview", *data, "--html", "preview.html")
    assert "zero3" in run("plan", "--model_name_or_path", "model", "--gpus", "2")
    (work / "tasks.jsonl").write_text(json.dumps({"prompt": "Question 1", "answer": "Answer 1"}))
    run("evaluate", "merged", "--start", "model", "--eval_tasks", "tasks.jsonl", "--max_completion_length", "4")
    assert "python" in run("doctor")
    demo = ["--max_steps", "1", "--output_dir", "demo", "--bf16", "false"]
    assert "new facts, questions as" in run("train", *demo)
