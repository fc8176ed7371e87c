"""The package as it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
