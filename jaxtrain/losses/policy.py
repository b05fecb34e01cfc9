"""Policy losses on packed rows: surrogate, importance correction, KL to a reference, aggregation.

Signals, all [B, T], of which only the first is always needed:

    advantages     of the model's own tokens
    old_logps      of the policy before the first update on these samples; without it, the present one's (on policy)
    sampler_logps  of whoever drew the samples
    ref_logps      of the reference policy, where beta is not 0 and the KL belongs to the loss

Every log-probability is taken under the sample's own temperature and support. `loss_weights` are 1 on the model's own
tokens, 0 on prompts, on what an environment wrote, and on samples that are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxtrain.losses.segments import segment_means, segment_sums
from jaxtrain.types import Array, Batch, Max, Mean, Metric, Min, Norm, TokenScores

Level = Literal["token", "sequence"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo", "sum"]
Divergence = Literal["k1", "k2", "k3"]


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


@dataclass(frozen=True)
class Objective:
    """The numbers of a policy loss."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None
    level: Level = "token"
    aggregation: Aggregation = "dapo"
    beta: float = 0.0  # of the KL in the loss; 0 needs no reference
    kl: Divergence = "k3"
    kl_bias_correction: bool = False  # weigh the KL by the token's ratio to the old policy
    correction: Correction | None = None
    max_completion_length: int = 1  # the divisor of `dr_grpo`

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                f"dual_clip={self.dual_clip} must be more than 1: at the old policy, where the ratio is 1, it would "
                "already cut off the gradient of every negative advantage"
            )
        if self.beta:
            check_kl_in_loss(self.kl, self.kl_bias_correction)

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over tokens, in which each appears with its own log-probability alone."""
        return self.level == "token" and (self.correction is None or self.correction.level == "token")


class Tokens(NamedTuple):
    """What a surrogate sees, [B, T] each."""

    logp: Array  # differentiable
    log_ratio: Array  # to the old policy, at the objective's level; differentiable
    advantages: Array
    weights: Array


Surrogate = Callable[[Tokens, Objective], Array]
"""(tokens, objective) -> the loss of each token [B, T], before correction, KL and aggregation."""


def clip(tokens: Tokens, objective: Objective) -> Array:
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A): PPO, Schulman et al. 2017 (arXiv:1707.06347).

    With different epsilons it is DAPO's clip-higher (arXiv:2503.14476), with `dual_clip` c the loss of a negative
    advantage is at most -c A (Ye et al. 2020, arXiv:1912.09729), and at the level `sequence` it is GSPO's.
    """
    ratio, advantages = jnp.exp(tokens.log_ratio), tokens.advantages
    clipped = jnp.clip(ratio, 1 - objective.epsilon_low, 1 + objective.epsilon_high)
    loss = jnp.maximum(-ratio * advantages, -clipped * advantages)
    if objective.dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -objective.dual_clip * advantages), loss)


def cispo(tokens: Tokens, objective: Objective) -> Array:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp: CISPO, MiniMax-M1, Chen et al. 2025 (arXiv:2506.13585).

    No token's gradient is dropped; only its weight is bounded.
    """
    ratio = jnp.clip(jnp.exp(tokens.log_ratio), 1 - objective.epsilon_low, 1 + objective.epsilon_high)
    return -jax.lax.stop_gradient(ratio) * tokens.advantages * tokens.logp


def divergence(kind: Divergence, logp: Array, ref: Array) -> Array:
    """Estimates of KL(policy || reference) from samples of the policy: Schulman 2020, "Approximating KL Divergence".

    k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r, with r = p_ref / p. Also for numpy arrays.
    """
    log_ratio = ref - logp
    match kind:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio**2 / 2
        case "k3":
            return jnp.expm1(log_ratio) - log_ratio


def check_kl_in_loss(kind: Divergence, bias_correction: bool) -> None:
    """Raise ValueError for an estimate whose gradient is not that of a KL.

    With y drawn from the policy p, what a loss descends is the mean over y of the derivative of the estimate at y:

        k1           0: the mean of d log p is 0, whatever the reference is
        k2           the gradient of KL(p || reference)
        k3           the gradient of KL(reference || p)
        k1, k3 times p / p_old, differentiated with it: the gradient of KL(p || reference); also off policy, for samples
            of p_old. DeepSeek-V3.2 (arXiv:2512.02556) has it so with k3.
    """
    if kind == "k1" and not bias_correction:
        raise ValueError(
            "kl=k1 in the loss has an expected gradient of 0: use k2 or k3, kl_bias_correction=true, or kl_in=reward"
        )
    if kind == "k2" and bias_correction:
        raise ValueError(
            "kl_bias_correction=true is for k1 and k3: k2 has the gradient of KL(policy || reference) without it"
        )


def aggregate(loss: Array, batch: Batch, norm: Norm, objective: Objective) -> Array:
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


def make_policy_loss(
    surrogate: Surrogate, objective: Objective
) -> Callable[[TokenScores, Batch, Norm], tuple[Array, dict[str, Metric]]]:
    """The loss of an algorithm, and TRL's metrics of it."""

    def loss(scores: TokenScores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        weights, signals, logp = batch.loss_weights, batch.signals, scores.logp
        old = signals["old_logps"] if "old_logps" in signals else jax.lax.stop_gradient(logp)
        log_ratio = (logp - old) * (weights > 0)
        # Far outside every bound already, and exp stays finite, so that no gradient is 0 * inf.
        token_log_ratio = jnp.clip(log_ratio, -20, 20)
        if objective.level == "sequence":  # GSPO, Zheng et al. 2025 (arXiv:2507.18071): the geometric mean
            log_ratio = segment_means(log_ratio, weights, batch.segment_ids)
        log_ratio = jnp.clip(log_ratio, -20, 20)
        tokens = Tokens(logp, log_ratio, signals["advantages"], weights)
        per_token = surrogate(tokens, objective)

        metrics = _sampling_metrics(old, signals["sampler_logps"], weights)
        if objective.correction is not None:
            factor = importance_weights(old, signals["sampler_logps"], batch, objective.correction)
            per_token = per_token * factor
            metrics |= _factor_metrics(factor, weights)
        if objective.beta:
            kl = divergence(objective.kl, logp, signals["ref_logps"])
            # The token's own ratio at either level, since the estimate is the token's.
            weighed = kl * jnp.exp(token_log_ratio) if objective.kl_bias_correction else kl
            per_token = per_token + objective.beta * weighed
            metrics["kl"] = _mean(kl, weights)
        value = aggregate(per_token, batch, norm, objective)
        metrics |= {
            # The loss is a sum over the microbatches, so that their weights must sum to 1.
            "loss": Mean(value, jnp.sum(weights) / jnp.maximum(norm.tokens, 1)),
            "entropy": _mean(scores.entropy, weights),
        }
        return value, metrics | _clip_metrics(tokens, objective)

    return loss


def importance_weights(old: Array, sampler: Array, batch: Batch, correction: Correction) -> Array:
    """p_old / p_sampler of every token [B, T], bounded; carries no gradient."""
    difference = (old - sampler) * (batch.loss_weights > 0)
    if correction.level == "sequence":
        difference = segment_sums(difference, batch.segment_ids)
    ratio = jnp.exp(difference)
    if correction.mode == "truncate":
        return jax.lax.stop_gradient(jnp.minimum(ratio, correction.cap))
    return jax.lax.stop_gradient(jnp.where(ratio > correction.cap, 0, ratio))


def _mean(values: Array, weights: Array) -> Mean:
    return Mean(jnp.sum(values * weights), jnp.sum(weights))


def _sampling_metrics(trainer: Array, sampler: Array, weights: Array) -> dict[str, Metric]:
    """How far the trainer's log-probabilities are from the sampler's.

    k1 and k3 estimate KL(sampler || trainer); `token_mult_prob_error` is NeMo-RL's mean of exp |difference|.
    """
    difference = (trainer - sampler) * (weights > 0)
    size = jnp.abs(difference)
    return {
        "sampling/sampling_logp_difference/mean": _mean(size, weights),
        "sampling/sampling_logp_difference/max": Max(jnp.max(size)),
        "sampling/k1": _mean(-difference, weights),
        "sampling/k3": _mean(jnp.expm1(difference) - difference, weights),
        "sampling/share_above_0.1": _mean(size > 0.1, weights),
        "sampling/token_mult_prob_error": _mean(jnp.exp(size), weights),
    }


def _factor_metrics(factor: Array, weights: Array) -> dict[str, Metric]:
    return {
        "sampling/importance_sampling_ratio/min": Min(jnp.min(jnp.where(weights > 0, factor, jnp.inf))),
        "sampling/importance_sampling_ratio/mean": _mean(factor, weights),
        "sampling/importance_sampling_ratio/max": Max(jnp.max(jnp.where(weights > 0, factor, -jnp.inf))),
    }


def _clip_metrics(tokens: Tokens, objective: Objective) -> dict[str, Metric]:
    """Shares of tokens that the bounds hold back; `_min` and `_max` are over microbatches."""
    ratio = jnp.exp(tokens.log_ratio)
    low = (ratio < 1 - objective.epsilon_low) & (tokens.advantages < 0)
    high = (ratio > 1 + objective.epsilon_high) & (tokens.advantages > 0)
    means = {name: _mean(where, tokens.weights) for name, where in (("low", low), ("high", high))}
    return {
        "clip_ratio/low_mean": means["low"],
        "clip_ratio/low_min": Min(means["low"].value),
        "clip_ratio/high_mean": means["high"],
        "clip_ratio/high_max": Max(means["high"].value),
        "clip_ratio/region_mean": _mean(low | high, tokens.weights),
    }
