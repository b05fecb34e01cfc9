"""Runs the recipe that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtrain.config import RunConfig, load_config
from jaxtrain.config.stages import has_stages, load_stages
from jaxtrain.train.preemption import Preemption

if TYPE_CHECKING:
    from jaxtrain.session.session import Outcome


def run(
    config: RunConfig,
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> Outcome:
    """Train by `config`, with the recipe that it names, as `jaxtrain train` does. Imports only that recipe's modules.

    The arguments and the errors are those of `Session.open`.
    """
    recipe = import_module(f"jaxtrain.recipes.{config.recipe}")
    return recipe.run(config, resume=resume, allow_change=allow_change, preemption=preemption)


def run_file(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> int:
    """Train by a YAML file, which may have `stages`. Returns the exit code of `jaxtrain train`.

    Raises ConfigError for a config that cannot be run. The other arguments and errors are those of `Session.open`.
    """
    if has_stages(path):
        stages = load_stages(path, overrides)
        from jaxtrain.recipes.stages import run_stages

        return run_stages(stages, resume=resume, allow_change=allow_change, preemption=preemption)
    config = load_config(path, list(overrides))
    return run(config, resume=resume, allow_change=allow_change, preemption=preemption).exit_code
