"""Puts the configs into wheels: they are at the root of the repository, and inside of the package once installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            configs = Path(self.build_lib) / "jaxtrain" / "configs"
            shutil.copytree("configs", configs, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithConfigs})
