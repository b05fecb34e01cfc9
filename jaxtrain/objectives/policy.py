"""Policy objectives on packed rows: surrogate, importance correction, KL to a reference, entropy bonus, aggregation.

Signals, all [B, T], of which only the first two are always needed:

    advantages            of the model's own tokens
    sampler_logps         of the sampler
    old_logps             of the policy before the first update on these samples; without it, the present one's
    ref_logps             of the reference policy, where beta is not 0 and the KL belongs to the loss
    entropy_coefficients  of the step, where the entropy has a target
    top_entropy           computed by `prepare`, where only the tokens of highest entropy are trained

Every log-probability is taken under the sample's own temperature and support. `loss_weights` are 1 on the model's own
tokens, 0 on prompts and on what an environment wrote. Samples that are left out are counted in `Batch.left_out`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.importance import BY_TOKEN, Correction, importance_weights, sampling_metrics
from jaxtrain.objectives.kl import Estimate, check_kl_in_loss, divergence
from jaxtrain.objectives.objective import Entropy, Logp, Score, ScoreRequest, weighted_mean
from jaxtrain.objectives.segments import per_segment, segment_means, segment_sums
from jaxtrain.types import Array, Batch, Max, Mean, Metric, Min, Norm, Scores

Level = Literal["token", "sequence", "product"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo", "sum"]
KLIn = Literal["loss", "reward"]

ENTROPY_COEFFICIENTS = "entropy_coefficients"
TOP_ENTROPY = "top_entropy"


class Tokens(NamedTuple):
    """The input of a surrogate, [B, T] each."""

    logp: Array  # differentiable
    log_ratio: Array  # to the old policy, at the objective's level; differentiable
    advantages: Array
    weights: Array
    segment_ids: Array
    importance: Array  # weights of the correction; 1 without one


@dataclass(frozen=True, kw_only=True)
class PolicyObjective(Checked, ABC):
    """What all policy objectives share. A custom one is a frozen dataclass with a `surrogate`.

    beta, kl and kl_in also define the KL in the reward, which is computed before the updates and not here.
    """

    epsilon_low: NonNegativeFloat = 0.2
    epsilon_high: NonNegativeFloat = 0.2
    # of the ratio to the old policy: of each token, the geometric mean or the product over a sample's tokens
    level: Level = "token"
    aggregation: Aggregation = "dapo"
    beta: NonNegativeFloat = 0.0  # of the KL to the reference; 0 needs no reference
    kl: Estimate = "k3"
    kl_in: KLIn = "loss"
    kl_bias_correction: bool = True  # in the loss: weigh the KL by the token's ratio to the old policy
    kl_target: PositiveFloat | None = None  # nats per token; in the reward: beta moves to keep the KL there
    entropy_coefficient: NonNegativeFloat = 0.0  # of the mean entropy, which is subtracted from the loss
    entropy_target: PositiveFloat | None = None  # nats; the coefficient falls to 0 as the entropy rises to it
    entropy_step: NonNegativeFloat = 0.0  # instead it moves by this after each rollout, and is 0 above the target
    entropy_max: PositiveFloat = 1.0  # the largest coefficient that it moves to
    top_entropy: Annotated[float, Field(ge=0, le=1)] = 1.0  # the surrogate is of this share of tokens, by entropy
    # nats; samples of negative advantage whose mean log(p_sampler / p) exceeds it are out of the surrogate
    off_policy_threshold: PositiveFloat | None = None
    correction: Correction | None = BY_TOKEN  # of the gap between the sampler's and the trainer's probabilities
    max_completion_length: PositiveInt = 1  # the divisor of `dr_grpo`
    temperature: PositiveFloat = 1.0  # that the samples were drawn at
    # Whether the derivative of `surrogate` is 0 where the advantage is. A class with its own surrogate sets it.
    proportional: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "proportional" not in vars(cls) and not vars(cls).keys().isdisjoint(("surrogate", "corrected", "__call__")):
            cls.proportional = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta and self.kl_in == "loss":
            check_kl_in_loss(self.kl, self.kl_bias_correction)
        if self.entropy_target is not None and not self.entropy_coefficient:
            raise ValueError(
                f"entropy_target={self.entropy_target} needs an entropy_coefficient "
                f"(which is {self.entropy_coefficient})"
            )

    @property
    def without_effect(self) -> dict[str, str]:
        """The fields that change nothing beside the values of the others -> why."""
        without: dict[str, str] = {}
        if self.entropy_target is None:
            without["entropy_step"] = "there is no entropy_target"
        if not self.entropy_step:
            without["entropy_max"] = "entropy_step is 0"
        if not self.beta:
            kl = ("kl", "kl_in", "kl_bias_correction", "kl_target")
            return without | dict.fromkeys(kl, "beta is 0, so there is no KL")
        if self.kl_in == "reward":
            return without | {"kl_bias_correction": "kl_in is reward, so the KL is not in the loss"}
        return without | {"kl_target": "kl_in is loss, and only the beta of a KL in the reward moves"}

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(self.temperature), Entropy(differentiable=self.entropy_coefficient != 0)

    @property
    def signals(self) -> tuple[str, ...]:
        """`old_logps` may be there or not."""
        optional = {
            "ref_logps": bool(self.beta) and self.kl_in == "loss",
            ENTROPY_COEFFICIENTS: self.entropy_target is not None,
            TOP_ENTROPY: self.top_entropy < 1,
        }
        return "advantages", "sampler_logps", *(name for name, needed in optional.items() if needed)

    @property
    def separable(self) -> bool:
        by_token = self.level == "token" and (self.correction is None or self.correction.level == "token")
        return by_token and self.off_policy_threshold is None

    @property
    def zeros_have_no_gradient(self) -> bool:
        """Whether samples of advantage 0 may be left out: the loss has no KL, no entropy bonus and no quantile."""
        with_kl = self.beta != 0 and self.kl_in == "loss"
        return self.proportional and not with_kl and not self.entropy_coefficient and self.top_entropy == 1

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Float[Array, "B T"]:
        """The loss of each token, before importance weights, KL, entropy bonus and aggregation."""

    def corrected(self, loss: Float[Array, "B T"], tokens: Tokens) -> Float[Array, "B T"]:
        """The surrogate with the importance weights of the correction."""
        return loss * tokens.importance

    def bound_metrics(self, tokens: Tokens) -> dict[str, Metric]:
        """TRL's shares of tokens that the bounds hold back, or of samples where the ratio is a sample's.

        `low_min` and `high_max` are over the shares of the samples.
        """
        ratio, weights = jnp.exp(tokens.log_ratio), tokens.weights
        low = (ratio < 1 - self.epsilon_low) & (tokens.advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (tokens.advantages > 0)
        low_shares, high_shares = (
            segment_means(where.astype(jnp.float32), weights, tokens.segment_ids) for where in (low, high)
        )
        return {
            "clip_ratio/low_mean": self._mean(low, tokens),
            "clip_ratio/low_min": Min(jnp.min(jnp.where(weights > 0, low_shares, jnp.inf))),
            "clip_ratio/high_mean": self._mean(high, tokens),
            "clip_ratio/high_max": Max(jnp.max(jnp.where(weights > 0, high_shares, -jnp.inf))),
            "clip_ratio/region_mean": self._mean(low | high, tokens),
        }

    def _mean(self, values: Array, tokens: Tokens) -> Mean:
        """Over tokens, or over samples where the ratio is a sample's."""
        by_sample = self.level != "token"
        return weighted_mean(values, per_segment(tokens.weights, tokens.segment_ids) if by_sample else tokens.weights)

    def prepare(self, score: Score, batch: Batch) -> Mapping[str, Array]:
        """The signal `top_entropy`: 0 below the quantile of the entropies of the batch, else 1 / the share of the rest.

        "Beyond the 80/20 Rule", Wang et al. 2025 (arXiv:2506.01939).
        """
        if self.top_entropy == 1:
            return {}
        weights = batch.loss_weights
        entropy = score(Logp(self.temperature), Entropy()).entropy
        quantile = jnp.nanquantile(jnp.where(weights > 0, entropy, jnp.nan), 1 - self.top_entropy)
        kept = (entropy >= quantile) * (weights > 0)
        return {TOP_ENTROPY: kept * jnp.sum(weights) / jnp.maximum(jnp.sum(kept * weights), 1)}

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """The loss, and TRL's metrics of it."""
        weights, signals, logp, ids = batch.loss_weights, batch.signals, scores.logp, batch.segment_ids
        present, sampler = jax.lax.stop_gradient(logp), signals["sampler_logps"]
        old = signals.get("old_logps", present)
        log_ratio = (logp - old) * (weights > 0)
        # Far outside every bound already, and exp stays finite, so that no gradient is 0 * inf.
        token_log_ratio = jnp.clip(log_ratio, -20, 20)
        if self.level == "sequence":  # GSPO, Zheng et al. 2025 (arXiv:2507.18071)
            log_ratio = segment_means(log_ratio, weights, ids)
        elif self.level == "product":  # RLOO, Ahmadian et al. 2024 (arXiv:2402.14740): a sample is one action
            log_ratio = segment_sums(log_ratio, ids)
        importance = importance_weights(old, sampler, batch, self.correction)
        tokens = Tokens(logp, jnp.clip(log_ratio, -20, 20), signals["advantages"], weights, ids, importance)

        per_token = self.corrected(self.surrogate(tokens), tokens)
        if self.off_policy_threshold is not None:  # equation 9 of DeepSeek-V3.2 (arXiv:2512.02556)
            drift = segment_means(sampler - present, weights, ids)
            per_token = per_token * ((tokens.advantages >= 0) | (drift <= self.off_policy_threshold))
        top = signals.get(TOP_ENTROPY, 1)
        per_token = per_token * (top > 0) if self.top_entropy < 1 else per_token

        metrics = sampling_metrics(old, sampler, importance, batch, self.correction) | self.bound_metrics(tokens)
        if self.beta and self.kl_in == "loss":
            kl = divergence(self.kl, logp, signals["ref_logps"])
            # The token's own ratio at every level, since the estimate is the token's.
            kl = kl * jnp.exp(token_log_ratio) if self.kl_bias_correction else kl
            per_token = per_token + self.beta * kl
            metrics["kl"] = weighted_mean(kl, weights)
        value = aggregate(per_token, batch, norm, self)
        if self.entropy_coefficient:
            coefficient = signals.get(ENTROPY_COEFFICIENTS, self.entropy_coefficient)
            bonus = coefficient * scores.entropy * top
            value = value - jnp.sum(bonus * weights) / jnp.maximum(norm.tokens, 1)
        metrics |= {
            # The loss is a sum over the microbatches, so that their weights must sum to 1.
            "loss": Mean(value, jnp.sum(ids > 0) / jnp.maximum(norm.real, 1)),
            "entropy": weighted_mean(scores.entropy, weights),
        }
        return value, metrics

    def coefficient_at(self, entropy: float, current: float) -> float:
        """The entropy bonus's coefficient, for samples of this mean entropy.

        Without a target it is `entropy_coefficient`. With one it is 0 above the target; below, it is `current` if it
        moves by `entropy_step`, else `entropy_coefficient` times 1 - entropy / target.
        """
        if self.entropy_target is None:
            return self.entropy_coefficient
        if self.entropy_step:
            return current if entropy <= self.entropy_target else 0.0
        return self.entropy_coefficient * max(0.0, 1 - entropy / self.entropy_target)


def aggregate(loss: Float[Array, "B T"], batch: Batch, norm: Norm, objective: PolicyObjective) -> Float[Array, ""]:
    """The loss of a microbatch, from the losses of its tokens.

    The sums are over this microbatch. The divisors are those of the whole global batch, and include the samples that
    were left out of it (`Batch.left_out`), so that the weight of a sample does not depend on the others.

    grpo     mean over the samples of the mean over their tokens: GRPO, Shao et al. 2024 (arXiv:2402.03300)
    dr_grpo  sum / (samples * max_completion_length): Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783)
    dapo     mean over all tokens of the batch: DAPO, Yu et al. 2025 (arXiv:2503.14476)
    bnpo     TRL's name for the token mean of a microbatch; k microbatches are one batch here, so it is the same
    sum      mean over the samples of the sum over their tokens: LUSPO (arXiv:2602.05261) at the level `sequence`
    """
    weighted = loss * batch.loss_weights
    match objective.aggregation:
        case "grpo":
            sizes = segment_sums(batch.loss_weights, batch.segment_ids)
            return jnp.sum(weighted / jnp.maximum(sizes, 1)) / jnp.maximum(norm.segments, 1)
        case "dr_grpo":
            return jnp.sum(weighted) / jnp.maximum(norm.segments * objective.max_completion_length, 1)
        case "sum":
            return jnp.sum(weighted) / jnp.maximum(norm.segments, 1)
        case "dapo" | "bnpo":
            return jnp.sum(weighted) / jnp.maximum(norm.tokens, 1)
