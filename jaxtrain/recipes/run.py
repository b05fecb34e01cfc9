"""A run by its config."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from jaxtrain.config import RunConfig
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
    """Do what `config` says, by the recipe that it names: what `jaxtrain train` does. The modules of that recipe alone
    are imported.

    The arguments and the errors are those of `Session.open`.
    """
    recipe = import_module(f"jaxtrain.recipes.{config.recipe}")
    return recipe.run(config, resume=resume, allow_change=allow_change, preemption=preemption)
