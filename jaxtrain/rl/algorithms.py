"""Algorithms as rows: an advantage estimator, a surrogate, and the numbers between them.

A row of your own is an `Algorithm` in a file of yours, named in the config as `rl.algorithm: my_file.py:MINE`; its two
functions are yours or the ready ones of `rl.advantages` and `losses.policy`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtrain.config import ConfigError
from jaxtrain.config.rl import CriticSection, RLSection
from jaxtrain.losses.policy import (
    Aggregation,
    Correction,
    Divergence,
    Level,
    Objective,
    Surrogate,
    check_kl_in_loss,
    cispo,
    clip,
)
from jaxtrain.named import load_named
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
    surrogate: Surrogate = clip
    level: Level = "token"  # of the ratio to the old policy
    aggregation: Aggregation = "dapo"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    beta: float = 0.0  # of the KL to the reference; 0 needs no reference
    kl: Divergence = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_bias_correction: bool = False  # KL in the loss: weighed by the ratio to the old policy
    max_refills: int = 0  # dynamic sampling: how often groups that are all alike are replaced by others
    overlong_filter: bool = False  # samples that were cut off carry no loss
    overlong_cache: float = 0.0  # soft punishment over this last share of max_completion_length; 0: none
    critic: bool = False
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def needs_reference(self) -> bool:
        return self.beta != 0

    @property
    def settings(self) -> Settings:
        return Settings(self.gamma, self.lam)

    def objective(self, correction: Correction | None, max_completion_length: int) -> Objective:
        return Objective(
            self.epsilon_low,
            self.epsilon_high,
            self.dual_clip,
            self.level,
            self.aggregation,
            self.beta if self.kl_in == "loss" else 0.0,
            self.kl,
            self.kl_bias_correction,
            correction,
            max_completion_length,
        )


ALGORITHMS = {
    # Shao et al. 2024, DeepSeekMath (arXiv:2402.03300). Its beta of 0.04 is out of use: R1 has 0.001, TRL 0.
    "grpo": Algorithm(group_normalised, aggregation="grpo"),
    # Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv:2503.20783).
    "dr_grpo": Algorithm(group_centred, aggregation="dr_grpo"),
    # Yu et al. 2025 (arXiv:2503.14476). The punished share is the paper's 4096 of 20480 tokens.
    "dapo": Algorithm(group_normalised, epsilon_high=0.28, max_refills=3, overlong_filter=True, overlong_cache=0.2),
    # Zheng et al. 2025, Group Sequence Policy Optimization (arXiv:2507.18071).
    "gspo": Algorithm(group_normalised, level="sequence", aggregation="grpo", epsilon_low=3e-4, epsilon_high=4e-4),
    # Ahmadian et al. 2024, Back to Basics (arXiv:2402.14740); beta is TRL's. Clipping only acts from the second update.
    "rloo": Algorithm(leave_one_out, aggregation="sum", beta=0.05, kl="k1", kl_in="reward"),
    # Hu 2025, REINFORCE++ (arXiv:2501.03262); beta is OpenRLHF's.
    "reinforce++": Algorithm(globally_normalised, beta=0.01, kl="k1", kl_in="reward"),
    # Chen et al. 2025, MiniMax-M1 (arXiv:2506.13585): the lower bound is off; the upper one, 5, is ScaleRL's
    # (Khatri et al. 2025, arXiv:2510.13786).
    "cispo": Algorithm(group_normalised, cispo, epsilon_low=1.0, epsilon_high=4.0),
    # Schulman et al. 2017 (arXiv:1707.06347) with GAE; for language models Ziegler et al. 2019 (arXiv:1909.08593).
    "ppo": Algorithm(gae, beta=0.05, kl="k1", kl_in="reward", critic=True),
}

_OVERRIDES = (
    "aggregation",
    "beta",
    "dual_clip",
    "epsilon_high",
    "epsilon_low",
    "gamma",
    "kl",
    "kl_bias_correction",
    "kl_in",
    "lam",
    "max_refills",
    "overlong_cache",
    "overlong_filter",
)

_READERS: dict[str, tuple[Callable[..., Any], ...]] = {"dual_clip": (clip,), "gamma": (gae,), "lam": (gae,)}
"""Numbers that only some of our functions read. All others are read by every one; a user's function may read all."""

_OURS: tuple[Callable[..., Any], ...] = (
    *(clip, cispo),
    *(gae, globally_normalised, group_centred, group_normalised, leave_one_out),
)


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
    given = {key: value for key in _OVERRIDES if (value := getattr(section, key)) is not None}
    algorithm = replace(row, **given)
    for key in given:
        if reason := _unread(key, algorithm):
            raise ConfigError(f"rl.{key}={given[key]} has no effect with rl.algorithm={name}: {reason}; leave it out")
    if algorithm.beta and algorithm.kl_in == "loss":
        try:
            check_kl_in_loss(algorithm.kl, algorithm.kl_bias_correction)
        except ValueError as error:
            raise ConfigError(f"rl.algorithm={name}, rl.kl_in=loss: {error}") from None
    return algorithm


def _unread(key: str, algorithm: Algorithm) -> str | None:
    """Why a number of this name changes nothing; None where it is read."""
    if key in ("kl", "kl_in", "kl_bias_correction") and not algorithm.beta:
        return "rl.beta is 0, so there is no KL"
    if key == "kl_bias_correction" and algorithm.kl_in == "reward":
        return "the KL belongs to the reward (rl.kl_in=reward)"
    readers = _READERS.get(key)
    used = (algorithm.advantages, algorithm.surrogate)
    if readers is None or any(each in readers or each not in _OURS for each in used):
        return None
    return f"only {' and '.join(each.__name__ for each in readers)} reads it"
