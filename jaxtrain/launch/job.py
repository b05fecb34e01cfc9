"""What is launched: a checked config, and the command of one process."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.config import load_config
from jaxtrain.config.stages import has_stages, load_stages


@dataclass(frozen=True)
class LaunchJob:
    """A run, and how often it is started."""

    config: Path
    overrides: tuple[str, ...]
    run_dir: Path  # of the stages together, if the config has stages
    nodes: int | None  # processes; None: as many as the backend's options say
    retries: int
    name: str

    def command(self, program: Sequence[str], config: Path | str | None = None) -> list[str]:
        """`program train CONFIG OVERRIDES`; `config` is its path where the command runs."""
        return [*program, "train", str(self.config if config is None else config), *self.overrides]

    def beside(self, suffix: str) -> Path:
        """The path of a file of the backend next to the run's folder, which only the run writes to."""
        return self.run_dir.with_name(self.run_dir.name + suffix)


def make_job(config: Path, overrides: Sequence[str], *, nodes: int | None, retries: int, name: str | None) -> LaunchJob:
    """Check the config, so that a wrong key is an error here and not on the cluster.

    The default of `name` is the last part of `run.dir`. Raises ConfigError for a config that cannot be run.
    """
    if has_stages(config):
        run_dir = load_stages(config, overrides)[0].folder.parent
    else:
        written = load_config(config, list(overrides)).run.dir
        # The files beside a folder at a URL are in the working directory.
        run_dir = Path(written.rstrip("/").rpartition("/")[2] if "://" in written else written)
    return LaunchJob(config, tuple(overrides), run_dir, nodes, retries, name or run_dir.name)


def dns_label(name: str, longest: int) -> str:
    """`name` as Kubernetes takes it: lower case, digits and hyphens, a letter first, at most `longest` characters.

    Raises ValueError for a name of which nothing is left, or that is too long.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label or not label[0].isalpha() or len(label) > longest:
        raise ValueError(
            f"{name!r} is no name of a Kubernetes object: give --name, a letter and then letters, digits and hyphens, "
            f"at most {longest} characters"
        )
    return label


def shell_words(command: Sequence[str], separator: str = " ") -> str:
    """The command as a shell reads it."""
    return separator.join(shlex.quote(word) for word in command)
