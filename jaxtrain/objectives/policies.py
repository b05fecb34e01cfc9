"""The policy objectives by name: the two surrogates, and the numbers of the papers."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtrain.objectives.kl import Estimate
from jaxtrain.objectives.policy import Aggregation, KLIn, Level, PolicyObjective, Tokens
from jaxtrain.types import Array


@dataclass(frozen=True, kw_only=True)
class ClippedPolicy(PolicyObjective):
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO, Schulman et al. 2017 (arXiv:1707.06347).

    With different epsilons it is DAPO's clip-higher (arXiv:2503.14476), with `dual_clip` c the loss of a negative
    advantage is at most -c A (Ye et al. 2020, arXiv:1912.09729), and at the level `sequence` it is GSPO's.
    """

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip={self.dual_clip} must be more than 1: at the old policy, where the ratio is 1, it would "
                "already cut off the gradient of every negative advantage"
            )

    def surrogate(self, tokens: Tokens) -> Array:
        ratio, advantages = jnp.exp(tokens.log_ratio), tokens.advantages
        clipped = jnp.clip(ratio, 1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
        if self.dual_clip is None:
            return loss
        return jnp.where(advantages < 0, jnp.minimum(loss, -self.dual_clip * advantages), loss)


@dataclass(frozen=True, kw_only=True)
class CISPO(PolicyObjective):
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp: CISPO, MiniMax-M1, Chen et al. 2025 (arXiv:2506.13585).

    No token's gradient is dropped; only its weight is bounded. The lower bound is off; the upper one, 5, is ScaleRL's
    (Khatri et al. 2025, arXiv:2510.13786).
    """

    epsilon_low: float = 1.0
    epsilon_high: float = 4.0

    def surrogate(self, tokens: Tokens) -> Array:
        ratio = jnp.clip(jnp.exp(tokens.log_ratio), 1 - self.epsilon_low, 1 + self.epsilon_high)
        return -jax.lax.stop_gradient(ratio) * tokens.advantages * tokens.logp


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedPolicy):
    """Shao et al. 2024, DeepSeekMath (arXiv:2402.03300). Its beta of 0.04 is out of use: R1 has 0.001, TRL 0."""

    aggregation: Aggregation = "grpo"


@dataclass(frozen=True, kw_only=True)
class DrGRPO(ClippedPolicy):
    """Liu et al. 2025, Understanding R1-Zero-Like Training (arXiv:2503.20783)."""

    aggregation: Aggregation = "dr_grpo"


@dataclass(frozen=True, kw_only=True)
class DAPO(ClippedPolicy):
    """Yu et al. 2025 (arXiv:2503.14476)."""

    epsilon_high: float = 0.28


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedPolicy):
    """Zheng et al. 2025, Group Sequence Policy Optimization (arXiv:2507.18071)."""

    level: Level = "sequence"
    aggregation: Aggregation = "grpo"
    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedPolicy):
    """Ahmadian et al. 2024, Back to Basics (arXiv:2402.14740); beta is TRL's. Clipping only acts from the second
    update on."""

    aggregation: Aggregation = "sum"
    beta: float = 0.05
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(ClippedPolicy):
    """Hu 2025, REINFORCE++ (arXiv:2501.03262); beta is OpenRLHF's."""

    beta: float = 0.01
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicy):
    """The policy's part: Schulman et al. 2017 (arXiv:1707.06347); for language models Ziegler et al. 2019
    (arXiv:1909.08593)."""

    beta: float = 0.05
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"
