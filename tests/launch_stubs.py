"""Commands of schedulers that are stubs, and a config to launch."""

import os
import stat
from pathlib import Path

import yaml

CONFIG = {
    "recipe": "sft",
    "run": {"dir": "runs/tiny"},
    "model": {"path": "model"},
    "data": {"train": {"path": "train.jsonl"}, "max_length": 64},
    "train": {"steps": 2, "batch_size": 8},
}


def write_config(folder: Path) -> Path:
    config = CONFIG | {"run": {"dir": str(folder / "runs" / "tiny")}}
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_stub(folder: Path, name: str, script: str) -> None:
    """A command that comes before a real one of its name on `path_with(folder)`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
