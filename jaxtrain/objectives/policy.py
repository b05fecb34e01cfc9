"""Policy objectives on packed rows: surrogate, importance correction, KL to a reference, entropy bonus, aggregation.

Signals, all [B, T], of which only the first two are always needed:

    advantages            of the model's own tokens
    sampler_logps         of whoever drew the samples
    old_logps             of the policy before the first update on these samples; without it, the present one's
    ref_logps             of the reference policy, where beta is not 0 and the KL belongs to the loss
    entropy_coefficients  of the step, where the entropy has a target

Every log-probability is taken under the sample's own temperature and support. `loss_weights` are 1 on the model's own
tokens, 0 on prompts, on what an environment wrote, and on samples that are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.objectives.kl import Estimate, check_kl_in_loss, divergence
from jaxtrain.objectives.objective import Entropy, Logp, Request, weighted_mean
from jaxtrain.objectives.segments import segment_means, segment_sums
from jaxtrain.types import Array, Batch, Max, Mean, Metric, Min, Norm, Scores

Level = Literal["token", "sequence"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo", "sum"]
KLIn = Literal["loss", "reward"]

ENTROPY_COEFFICIENTS = "entropy_coefficients"


@dataclass(frozen=True)
class Correction:
    """What becomes of w = p_old / p_sampler, which weighs the loss of a token.

    Truncated importance sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training". `sequence` takes the product over a sample's tokens. `truncate` cuts w off at `cap`, `mask` drops what
    lies beyond (MIS, as TRL has it).
    """

    level: Level = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: float = 2.0


class Tokens(NamedTuple):
    """What a surrogate is given, [B, T] each."""

    logp: Array  # differentiable
    log_ratio: Array  # to the old policy, at the objective's level; differentiable
    advantages: Array
    weights: Array


@dataclass(frozen=True, kw_only=True)
class PolicyObjective(ABC):
    """What all policy objectives share. One of your own is a frozen dataclass with a `surrogate`.

    beta, kl and kl_in also say what the KL in the reward is, which is taken before the updates and not here.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    level: Level = "token"  # of the ratio to the old policy
    aggregation: Aggregation = "dapo"
    beta: float = 0.0  # of the KL to the reference; 0 needs no reference
    kl: Estimate = "k3"
    kl_in: KLIn = "loss"
    kl_bias_correction: bool = False  # in the loss: weigh the KL by the token's ratio to the old policy
    entropy_coefficient: float = 0.0  # of the entropy, which is subtracted from the loss
    entropy_target: float | None = None  # nats; the coefficient falls to 0 as the entropy of the samples rises to it
    correction: Correction | None = None
    max_completion_length: int = 1  # the divisor of `dr_grpo`
    temperature: float = 1.0  # that the samples were drawn at

    def __post_init__(self) -> None:
        if self.beta and self.kl_in == "loss":
            check_kl_in_loss(self.kl, self.kl_bias_correction)
        if self.entropy_target is not None and not (self.entropy_target > 0 and self.entropy_coefficient):
            raise ValueError(
                f"entropy_target={self.entropy_target} must be more than 0, and needs an entropy_coefficient "
                f"(which is {self.entropy_coefficient})"
            )

    @property
    def needs(self) -> tuple[Request, ...]:
        return Logp(self.temperature), Entropy(differentiable=self.entropy_coefficient != 0)

    @property
    def signals(self) -> tuple[str, ...]:
        """`old_logps` may be there or not."""
        reference = ("ref_logps",) if self.beta and self.kl_in == "loss" else ()
        coefficients = () if self.entropy_target is None else (ENTROPY_COEFFICIENTS,)
        return "advantages", "sampler_logps", *reference, *coefficients

    @property
    def separable(self) -> bool:
        return self.level == "token" and (self.correction is None or self.correction.level == "token")

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Array:
        """The loss of each token [B, T], before correction, KL, entropy bonus and aggregation."""

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        """The loss, and TRL's metrics of it."""
        weights, signals, logp = batch.loss_weights, batch.signals, scores.logp
        old = signals["old_logps"] if "old_logps" in signals else jax.lax.stop_gradient(logp)
        log_ratio = (logp - old) * (weights > 0)
        # Far outside every bound already, and exp stays finite, so that no gradient is 0 * inf.
        token_log_ratio = jnp.clip(log_ratio, -20, 20)
        if self.level == "sequence":  # GSPO, Zheng et al. 2025 (arXiv:2507.18071): the geometric mean
            log_ratio = segment_means(log_ratio, weights, batch.segment_ids)
        log_ratio = jnp.clip(log_ratio, -20, 20)
        tokens = Tokens(logp, log_ratio, signals["advantages"], weights)
        per_token = self.surrogate(tokens)

        metrics = _sampling_metrics(old, signals["sampler_logps"], weights)
        if self.correction is not None:
            factor = importance_weights(old, signals["sampler_logps"], batch, self.correction)
            per_token = per_token * factor
            metrics |= _factor_metrics(factor, weights)
        if self.beta and self.kl_in == "loss":
            kl = divergence(self.kl, logp, signals["ref_logps"])
            # The token's own ratio at either level, since the estimate is the token's.
            weighed = kl * jnp.exp(token_log_ratio) if self.kl_bias_correction else kl
            per_token = per_token + self.beta * weighed
            metrics["kl"] = weighted_mean(kl, weights)
        if self.entropy_coefficient:
            adaptive = self.entropy_target is not None
            coefficient = signals[ENTROPY_COEFFICIENTS] if adaptive else self.entropy_coefficient
            per_token = per_token - coefficient * scores.entropy
        value = aggregate(per_token, batch, norm, self)
        metrics |= {
            # The loss is a sum over the microbatches, so that their weights must sum to 1.
            "loss": Mean(value, jnp.sum(weights) / jnp.maximum(norm.tokens, 1)),
            "entropy": weighted_mean(scores.entropy, weights),
        }
        return value, metrics | _clip_metrics(tokens, self)

    def coefficient_at(self, entropy: float) -> float:
        """The entropy bonus's coefficient, for samples of this mean entropy.

        Without a target it is `entropy_coefficient`. With one it is that times 1 - entropy / target, and 0 above the
        target: it follows from the samples of a step alone, so that a resumed run needs no state of it.
        """
        if self.entropy_target is None:
            return self.entropy_coefficient
        return self.entropy_coefficient * max(0.0, 1 - entropy / self.entropy_target)


def aggregate(loss: Array, batch: Batch, norm: Norm, objective: PolicyObjective) -> Array:
    """[B, T] -> []. The sums are over this microbatch, the divisors those of the whole global batch.

    grpo     mean over the samples of the mean over their tokens: GRPO, Shao et al. 2024 (arXiv:2402.03300)
    dr_grpo  sum / (samples * max_completion_length): Dr. GRPO, Liu et al. 2025 (arXiv:2503.20783)
    dapo     mean over all tokens of the batch: DAPO, Yu et al. 2025 (arXiv:2503.14476)
    bnpo     TRL's name for the token mean of a microbatch; k microbatches are one batch here, so it is the same
    sum      mean over the samples of the sum over their tokens: -A log p(y|x), a sample being one action
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


def importance_weights(old: Array, sampler: Array, batch: Batch, correction: Correction) -> Array:
    """p_old / p_sampler of every token [B, T], bounded; carries no gradient."""
    difference = (old - sampler) * (batch.loss_weights > 0)
    if correction.level == "sequence":
        difference = segment_sums(difference, batch.segment_ids)
    ratio = jnp.exp(difference)
    if correction.mode == "truncate":
        return jax.lax.stop_gradient(jnp.minimum(ratio, correction.cap))
    return jax.lax.stop_gradient(jnp.where(ratio > correction.cap, 0, ratio))


def _sampling_metrics(trainer: Array, sampler: Array, weights: Array) -> dict[str, Metric]:
    """How far the trainer's log-probabilities are from the sampler's.

    k1 and k3 estimate KL(sampler || trainer); `token_mult_prob_error` is NeMo-RL's mean of exp |difference|.
    """
    difference = (trainer - sampler) * (weights > 0)
    size = jnp.abs(difference)
    return {
        "sampling/sampling_logp_difference/mean": weighted_mean(size, weights),
        "sampling/sampling_logp_difference/max": Max(jnp.max(size)),
        "sampling/k1": weighted_mean(-difference, weights),
        "sampling/k3": weighted_mean(jnp.expm1(difference) - difference, weights),
        "sampling/share_above_0.1": weighted_mean(size > 0.1, weights),
        "sampling/token_mult_prob_error": weighted_mean(jnp.exp(size), weights),
    }


def _factor_metrics(factor: Array, weights: Array) -> dict[str, Metric]:
    return {
        "sampling/importance_sampling_ratio/min": Min(jnp.min(jnp.where(weights > 0, factor, jnp.inf))),
        "sampling/importance_sampling_ratio/mean": weighted_mean(factor, weights),
        "sampling/importance_sampling_ratio/max": Max(jnp.max(jnp.where(weights > 0, factor, -jnp.inf))),
    }


def _clip_metrics(tokens: Tokens, objective: PolicyObjective) -> dict[str, Metric]:
    """Shares of tokens that the bounds hold back; `_min` and `_max` are over microbatches."""
    ratio = jnp.exp(tokens.log_ratio)
    low = (ratio < 1 - objective.epsilon_low) & (tokens.advantages < 0)
    high = (ratio > 1 + objective.epsilon_high) & (tokens.advantages > 0)
    means = {name: weighted_mean(where, tokens.weights) for name, where in (("low", low), ("high", high))}
    return {
        "clip_ratio/low_mean": means["low"],
        "clip_ratio/low_min": Min(means["low"].value),
        "clip_ratio/high_mean": means["high"],
        "clip_ratio/high_max": Max(means["high"].value),
        "clip_ratio/region_mean": weighted_mean(low | high, tokens.weights),
    }
