"""Algorithms as rows: an advantage estimator, an objective, and how samples are collected.

A row of your own is an `Algorithm` in a file of yours, named in the config as `rl.algorithm: my_file.py:MINE`; its
estimator and its objective are yours or the ready ones of `rl.advantages` and `objectives.policies`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

from jaxtrain.config import ConfigError
from jaxtrain.config.rl import CriticSection, RLSection
from jaxtrain.named import load_named
from jaxtrain.objectives.policies import CISPO, DAPO, GRPO, GSPO, PPO, RLOO, DrGRPO, ReinforcePlusPlus
from jaxtrain.objectives.policy import Correction, PolicyObjective
from jaxtrain.rl.advantages import (
    Estimator,
    Settings,
    gae,
    globally_normalised,
    group_centred,
    group_normalised,
    leave_one_out,
)


@dataclass(frozen=True)
class Algorithm:
    """What distinguishes one algorithm from another. The config's `rl:` section may change any of the numbers."""

    advantages: Estimator
    objective: PolicyObjective = field(default_factory=GRPO)
    max_refills: int = 0  # dynamic sampling: how often groups that are all alike are replaced by others
    overlong_filter: bool = False  # samples that were cut off carry no loss
    overlong_cache: float = 0.0  # soft punishment over this last share of max_completion_length; 0: none
    critic: bool = False
    gamma: float = 1.0  # of the estimator, as lam
    lam: float = 0.95

    @property
    def needs_reference(self) -> bool:
        return self.objective.beta != 0

    @property
    def settings(self) -> Settings:
        return Settings(self.gamma, self.lam)


ALGORITHMS = {
    "grpo": Algorithm(group_normalised, GRPO()),
    "dr_grpo": Algorithm(group_centred, DrGRPO()),
    # The punished share is the paper's 4096 of 20480 tokens.
    "dapo": Algorithm(group_normalised, DAPO(), max_refills=3, overlong_filter=True, overlong_cache=0.2),
    "gspo": Algorithm(group_normalised, GSPO()),
    "rloo": Algorithm(leave_one_out, RLOO()),
    "reinforce++": Algorithm(globally_normalised, ReinforcePlusPlus()),
    "cispo": Algorithm(group_normalised, CISPO()),
    "ppo": Algorithm(gae, PPO(), critic=True),
}

_OBJECTIVE_NUMBERS = (
    *("aggregation", "beta", "dual_clip", "entropy_coefficient", "entropy_target", "epsilon_high", "epsilon_low"),
    *("kl", "kl_bias_correction", "kl_in"),
)
_OTHER_NUMBERS = ("gamma", "lam", "max_refills", "overlong_cache", "overlong_filter")

_READERS: dict[str, tuple[Estimator, ...]] = {"gamma": (gae,), "lam": (gae,)}
"""The ready estimators that read a number. An objective reads the numbers that are its fields."""

_ESTIMATORS: tuple[Estimator, ...] = (gae, globally_normalised, group_centred, group_normalised, leave_one_out)
"""The ready ones. One of the user's own may read all numbers."""


def find_algorithm(section: RLSection) -> Algorithm:
    """The row that `rl.algorithm` names, with the section's own numbers in it. Raises ConfigError."""
    name = section.algorithm
    if name not in ALGORITHMS and ":" not in name:
        near = difflib.get_close_matches(name, ALGORITHMS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(ALGORITHMS)}"
        raise ConfigError(f"rl.algorithm: there is no {name!r}{hint}; one of your own is named file.py:NAME")
    row: Any = ALGORITHMS.get(name) or load_named(name, "rl.algorithm")
    if not isinstance(row, Algorithm):
        raise ConfigError(f"rl.algorithm: {name!r} is no Algorithm (jaxtrain.rl.algorithms) but {type(row).__name__}")
    if not row.critic and section.critic != CriticSection():
        raise ConfigError(f"rl.critic: {name} has no critic; among ours ppo has one")
    given = {key: value for key in _OBJECTIVE_NUMBERS + _OTHER_NUMBERS if (value := getattr(section, key)) is not None}
    for key, value in given.items():
        if reason := _unread(key, given, row):
            raise ConfigError(f"rl.{key}={value} has no effect with rl.algorithm={name}: {reason}; leave it out")
    run = {
        "correction": section.correction and Correction(**section.correction.model_dump()),
        "max_completion_length": section.max_completion_length,
        "temperature": section.sampling.temperature,
    }
    numbers = {key: value for key, value in given.items() if key in _OBJECTIVE_NUMBERS}
    try:
        objective = replace(row.objective, **numbers, **run)
    except ValueError as error:
        raise ConfigError(f"rl.algorithm={name}: {error}") from None
    return replace(row, objective=objective, **{key: given[key] for key in _OTHER_NUMBERS if key in given})


def _unread(key: str, given: dict[str, Any], row: Algorithm) -> str | None:
    """Why a number of this name changes nothing; None where it is read."""
    if key in _OBJECTIVE_NUMBERS and key not in {each.name for each in fields(row.objective)}:
        return f"{type(row.objective).__name__} does not read it"
    if key in ("kl", "kl_in", "kl_bias_correction") and not given.get("beta", row.objective.beta):
        return "rl.beta is 0, so there is no KL"
    if key == "kl_bias_correction" and given.get("kl_in", row.objective.kl_in) == "reward":
        return "the KL belongs to the reward (rl.kl_in=reward)"
    readers = _READERS.get(key)
    if readers is None or row.advantages in readers or row.advantages not in _ESTIMATORS:
        return None
    return f"only {' and '.join(each.__name__ for each in readers)} reads it"
