"""KTO: preferences of single answers, each labelled as good or bad.

An answer is a bundle of two segments: the prompt with the answer, and the prompt with the answer to another prompt,
from which the KL divergence is estimated. Signals, all [B, T]:

    label      1 on a good answer's tokens, 0 on a bad one's, -1 on those of an answer to another prompt
    ref_logps  of the reference policy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.nn import sigmoid

from jaxtrain.objectives.objective import Correct, Entropy, Logp, Score, ScoreRequest, mean_where, weighted_mean
from jaxtrain.objectives.segments import bundle_sums, bundles_with
from jaxtrain.types import LABEL, MISMATCHED, REF_LOGPS, Array, Batch, Mean, Metric, Norm, Scores

_KL = "kl"
_SHARES = "kto_shares"  # of an answer's tokens: 1 / the number of good or of bad answers in the global batch


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimization: Ethayarajh et al. 2024 (arXiv:2402.01306), equations 7 and 8.

    With r = log(pi / pi_ref) of an answer and s the logistic function, the mean over the answers of

        kto       desirable_weight (1 - s(beta (r - z))) of a good one, undesirable_weight (1 - s(beta (z - r))) of a
                  bad one; z = max(0, mean over the global batch of r of answers to other prompts), without gradient
        apo_zero  desirable_weight (1 - s(beta r)), undesirable_weight s(beta r): D'Oosterlinck et al. 2024
                  (arXiv:2408.06266), equation 7, TRL's apo_zero_unpaired; needs no answers to other prompts
    """

    loss: Literal["kto", "apo_zero"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be more than 0")
        if min(self.desirable_weight, self.undesirable_weight) < 0:
            raise ValueError("desirable_weight and undesirable_weight must not be negative")

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(), Entropy(), Correct()

    @property
    def has_reference(self) -> bool:
        return True

    @property
    def mismatched(self) -> bool:
        """Whether the loss reads answers to other prompts."""
        return self.loss == "kto"

    @property
    def signals(self) -> tuple[str, ...]:
        return LABEL, REF_LOGPS, _KL, _SHARES

    @property
    def separable(self) -> bool:
        return False

    def prepare(self, score: Score, batch: Batch) -> Mapping[str, Array]:
        """z, and the shares of the answers, at every token."""
        label, weights, ids = batch.signals[LABEL], batch.loss_weights, batch.segment_ids
        good, bad = (jnp.sum(bundles_with(jnp.where(label == value, weights, 0), ids)) for value in (1, 0))
        shares = jnp.where(label == 1, 1 / jnp.maximum(good, 1), 1 / jnp.maximum(bad, 1))
        z = jnp.zeros(())
        if self.mismatched:
            others = jnp.where(label == MISMATCHED, weights, 0)
            ratios = (score(Logp()).logp - batch.signals[REF_LOGPS]) * others
            z = jnp.maximum(jnp.sum(ratios) / jnp.maximum(jnp.sum(bundles_with(others, ids)), 1), 0)
        return {_KL: jnp.full_like(weights, z), _SHARES: shares.astype(jnp.float32)}

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        label, ids = batch.signals[LABEL], batch.segment_ids
        weights = jnp.where(label == MISMATCHED, 0, batch.loss_weights)
        tokens = bundle_sums(weights, ids)
        answers = bundles_with(weights, ids)
        good = bundles_with(jnp.where(label == 1, weights, 0), ids)
        z, share = (
            bundle_sums(batch.signals[name] * weights, ids) / jnp.maximum(tokens, 1e-9) for name in (_KL, _SHARES)
        )
        logp = bundle_sums(scores.logp * weights, ids)
        reward = self.beta * (logp - bundle_sums(batch.signals[REF_LOGPS] * weights, ids))
        above = reward - self.beta * z
        losses = jnp.where(
            good, self.desirable_weight * sigmoid(-above), self.undesirable_weight * sigmoid(above)
        )  # 1 - s(x) = s(-x)
        value = jnp.sum(jnp.where(answers, losses, 0)) / jnp.maximum(norm.bundles, 1)
        count = jnp.sum(answers)
        sides = {"chosen": good, "rejected": answers & ~good}

        margin = jnp.sum(jnp.where(good, reward, jnp.where(answers, -reward, 0)) * share)
        metrics: dict[str, Metric] = {
            "loss": Mean(value * norm.bundles, count),
            "rewards/margins": Mean(margin * norm.bundles, count),
        }
        metrics |= {f"rewards/{name}": mean_where(of, reward) for name, of in sides.items()}
        metrics |= {f"logps/{name}": mean_where(of, logp) for name, of in sides.items()}
        if self.mismatched:
            metrics["kl"] = mean_where(answers, z)
        metrics["entropy"] = weighted_mean(scores.entropy, weights)
        metrics["mean_token_accuracy"] = weighted_mean(scores.correct, weights)
        return value, metrics
