"""Adds ds_configs/, which is beside the package in a clone, to the package in a wheel. All else: pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "sdft_ds", "ds_configs")
            self.mkpath(str(target))
            for file in sorted(Path("ds_configs").glob("*.json")):
                self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithConfigs})
