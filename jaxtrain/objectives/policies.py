"""The policy objectives by name: the surrogates, and the numbers of the papers."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat

from jaxtrain.objectives.importance import BY_SAMPLE, Correction
from jaxtrain.objectives.kl import Estimate
from jaxtrain.objectives.policy import Aggregation, KLIn, Level, PolicyObjective, Tokens
from jaxtrain.objectives.segments import segment_sums
from jaxtrain.types import Array, Metric

_LEAST_LOG_WEIGHT = math.log(1e-8)  # of VESPO, where the weight of a sample is 0 in float32 for the default k


@dataclass(frozen=True, kw_only=True)
class ClippedPolicy(PolicyObjective):
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO, Schulman et al. 2017 (arXiv:1707.06347).

    With different epsilons it is DAPO's clip-higher (arXiv:2503.14476), with `dual_clip` c the loss of a negative
    advantage is at most -c A (Ye et al. 2020, arXiv:1912.09729), and at the level `sequence` it is GSPO's.
    """

    dual_clip: float | None = None
    proportional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip={self.dual_clip} must be more than 1: at the old policy, where the ratio is 1, it would "
                "already cut off the gradient of every negative advantage"
            )

    def surrogate(self, tokens: Tokens) -> Float[Array, "B T"]:
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

    epsilon_low: NonNegativeFloat = 1.0
    epsilon_high: NonNegativeFloat = 4.0
    proportional: ClassVar[bool] = True

    def surrogate(self, tokens: Tokens) -> Float[Array, "B T"]:
        ratio = jnp.clip(jnp.exp(tokens.log_ratio), 1 - self.epsilon_low, 1 + self.epsilon_high)
        return -jax.lax.stop_gradient(ratio) * tokens.advantages * tokens.logp

    def bound_metrics(self, tokens: Tokens) -> dict[str, Metric]:
        """TRL's `cispo_clip_ratio`: the share of tokens of positive advantage above the upper bound."""
        capped = (jnp.exp(tokens.log_ratio) > 1 + self.epsilon_high) & (tokens.advantages > 0)
        return {"cispo_clip_ratio": self._mean(capped, tokens)}


@dataclass(frozen=True, kw_only=True)
class _Unbounded(PolicyObjective):
    """An objective whose ratio has a smooth weight instead of bounds."""

    @property
    def without_effect(self) -> dict[str, str]:
        reason = f"{type(self).__name__} weighs the ratio smoothly and has no bounds"
        return super().without_effect | dict.fromkeys(("epsilon_low", "epsilon_high"), reason)

    def bound_metrics(self, tokens: Tokens) -> dict[str, Metric]:
        return {}


@dataclass(frozen=True, kw_only=True)
class SAPO(_Unbounded):
    """-(4 / tau) sigmoid(tau (r - 1)) A: Soft Adaptive Policy Optimization, Gao et al. 2025 (arXiv:2511.20347).

    tau is `tau_pos` where A > 0, else `tau_neg`. At r = 1 the gradient is that of r A.
    """

    aggregation: Aggregation = "grpo"
    tau_pos: PositiveFloat = 1.0
    tau_neg: PositiveFloat = 1.05
    proportional: ClassVar[bool] = True

    def surrogate(self, tokens: Tokens) -> Float[Array, "B T"]:
        tau = jnp.where(tokens.advantages > 0, self.tau_pos, self.tau_neg)
        return -4 / tau * jax.nn.sigmoid(tau * (jnp.exp(tokens.log_ratio) - 1)) * tokens.advantages


@dataclass(frozen=True, kw_only=True)
class VESPO(_Unbounded):
    """-sg(w^k exp(lambda (1 - w))) A logp: Variational Sequence-Level Soft Policy Optimization (arXiv:2602.10693).

    w = prod p / p_sampler over the sample: the product ratio to the old policy times the correction's weights. k and
    lambda are those of `pos` where A >= 0, else those of `neg`.
    """

    level: Level = "product"
    k_pos: NonNegativeFloat = 2.0
    lambda_pos: PositiveFloat = 3.0
    k_neg: NonNegativeFloat = 3.0
    lambda_neg: PositiveFloat = 2.0
    proportional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level != "product":
            raise ValueError(f"level={self.level}: VESPO weighs samples by their product ratio, which is level=product")

    def surrogate(self, tokens: Tokens) -> Float[Array, "B T"]:
        return -self._phi(tokens) * tokens.advantages * tokens.logp

    def corrected(self, loss: Float[Array, "B T"], tokens: Tokens) -> Float[Array, "B T"]:
        return loss  # the weights are part of w

    def bound_metrics(self, tokens: Tokens) -> dict[str, Metric]:
        return {"vespo/phi_seq_mean": self._mean(self._phi(tokens), tokens)}

    def _phi(self, tokens: Tokens) -> Float[Array, "B T"]:
        positive = tokens.advantages >= 0
        k, lam = jnp.where(positive, self.k_pos, self.k_neg), jnp.where(positive, self.lambda_pos, self.lambda_neg)
        correction = jnp.clip(jnp.log(tokens.importance), _LEAST_LOG_WEIGHT, 20)
        if self.correction is not None and self.correction.level == "token":
            correction = segment_sums(correction * (tokens.weights > 0), tokens.segment_ids)
        log_w = jnp.clip(tokens.log_ratio + correction, _LEAST_LOG_WEIGHT, 20)
        return jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))


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

    epsilon_high: NonNegativeFloat = 0.28


@dataclass(frozen=True, kw_only=True)
class GSPO(ClippedPolicy):
    """Zheng et al. 2025, Group Sequence Policy Optimization (arXiv:2507.18071)."""

    level: Level = "sequence"
    aggregation: Aggregation = "grpo"
    epsilon_low: NonNegativeFloat = 3e-4
    epsilon_high: NonNegativeFloat = 4e-4


@dataclass(frozen=True, kw_only=True)
class RLOO(ClippedPolicy):
    """-min(R A, clip(R) A), R = p(y|x) / p_old(y|x) of the whole sample, mean over the samples: Ahmadian et al. 2024,
    Back to Basics (arXiv:2402.14740); beta and the bounds of R are TRL's. They only act from the second update on."""

    level: Level = "product"
    aggregation: Aggregation = "grpo"  # R and A are the same for all tokens, so this is the mean over the samples
    correction: Correction | None = BY_SAMPLE
    beta: NonNegativeFloat = 0.05
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(ClippedPolicy):
    """Hu 2025, REINFORCE++ (arXiv:2501.03262); beta is OpenRLHF's."""

    beta: NonNegativeFloat = 0.01
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"


@dataclass(frozen=True, kw_only=True)
class PPO(ClippedPolicy):
    """The policy's part: Schulman et al. 2017 (arXiv:1707.06347); for language models Ziegler et al. 2019
    (arXiv:1909.08593)."""

    beta: NonNegativeFloat = 0.05
    kl: Estimate = "k1"
    kl_in: KLIn = "reward"
