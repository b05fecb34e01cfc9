"""Importance weights p_old / p_sampler: what a policy objective does about the gap between sampler and trainer."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.objective import weighted_mean
from jaxtrain.objectives.segments import per_segment, segment_sums
from jaxtrain.types import Array, Batch, Max, Metric, Min


@dataclass(frozen=True)
class Correction(Checked):
    """How w = p_old / p_sampler weighs the loss of a token.

    Truncated importance sampling: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training". `sequence` takes the product over a sample's tokens. `truncate` limits w to [floor, cap], `mask` drops
    what lies outside (MIS; IcePop, arXiv:2510.18855).
    """

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: PositiveFloat = 2.0
    floor: NonNegativeFloat = 0.0  # 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor > self.cap:
            raise ValueError(f"correction: floor={self.floor} must not be more than cap={self.cap}")


BY_TOKEN, BY_SAMPLE = Correction(), Correction(level="sequence")


def importance_weights(
    old: Float[Array, "B T"], sampler: Float[Array, "B T"], batch: Batch, correction: Correction | None
) -> Float[Array, "B T"]:
    """p_old / p_sampler of every token, bounded, without gradient; 1 without a correction."""
    if correction is None:
        return jnp.ones_like(sampler)
    difference = (old - sampler) * (batch.loss_weights > 0)
    if correction.level == "sequence":
        difference = segment_sums(difference, batch.segment_ids)
    ratio = jnp.exp(difference)
    bounded = jnp.clip(ratio, correction.floor, correction.cap)
    if correction.mode == "mask":
        bounded = jnp.where(ratio == bounded, ratio, 0)
    return jax.lax.stop_gradient(bounded)


def sampling_metrics(
    trainer: Array, sampler: Array, importance: Array, batch: Batch, correction: Correction | None
) -> dict[str, Metric]:
    """How far the trainer's log-probabilities are from the sampler's, and the importance weights.

    k1 and k3 estimate KL(sampler || trainer); `token_mult_prob_error` is NeMo-RL's mean of exp |difference|. The
    weights are TRL's metrics: of tokens, or of samples at the level `sequence`.
    """
    weights = batch.loss_weights
    difference = (trainer - sampler) * (weights > 0)
    size = jnp.abs(difference)
    metrics: dict[str, Metric] = {
        "sampling/sampling_logp_difference/mean": weighted_mean(size, weights),
        "sampling/sampling_logp_difference/max": Max(jnp.max(size)),
        "sampling/k1": weighted_mean(-difference, weights),
        "sampling/k3": weighted_mean(jnp.expm1(difference) - difference, weights),
        "sampling/share_above_0.1": weighted_mean(size > 0.1, weights),
        "sampling/token_mult_prob_error": weighted_mean(jnp.exp(size), weights),
    }
    if correction is None:
        return metrics
    of_samples = correction.level == "sequence"
    counted = per_segment(weights, batch.segment_ids) if of_samples else weights
    return metrics | {
        "sampling/importance_sampling_ratio/min": Min(jnp.min(jnp.where(weights > 0, importance, jnp.inf))),
        "sampling/importance_sampling_ratio/mean": weighted_mean(importance, counted),
        "sampling/importance_sampling_ratio/max": Max(jnp.max(jnp.where(weights > 0, importance, -jnp.inf))),
    }
