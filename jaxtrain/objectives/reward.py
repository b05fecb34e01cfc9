"""Objectives of reward models: what a scalar head gives for the state at a token that has a weight.

That is the last token of a text, or of each step of an answer. Signals, all [B, T]:

    sign    of pairs: 1 on the chosen text's tokens, -1 on the rejected one's
    margin  of pairs, where the data have it: by how much the chosen one is better
    label   of single texts or steps: the score, or the probability that it is good
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtrain.objectives.objective import Reward, ScoreRequest, mean_where
from jaxtrain.objectives.segments import bundle_sums, bundles_with
from jaxtrain.types import LABEL, MARGIN, SIGN, Array, Batch, Max, Mean, Metric, Min, Norm, Scores


@dataclass(frozen=True, kw_only=True)
class BradleyTerry:
    """-log s(r_c - r_l - margin), mean over the pairs: Bradley and Terry 1952; for language models Ouyang et al. 2022
    (arXiv:2203.02155), with margins Touvron et al. 2023 (arXiv:2307.09288).

    `center` weighs (r_c + r_l)^2, which keeps the rewards around 0: Eisenstein et al. 2023 (arXiv:2312.09244).
    """

    center: float = 0.0

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return (Reward(),)

    @property
    def signals(self) -> tuple[str, ...]:
        """`margin` may be there or not."""
        return (SIGN,)

    @property
    def separable(self) -> bool:
        return False

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        assert batch.bundle_ids is not None, "preference pairs must be packed as bundles"
        sign, ids, scored = batch.signals[SIGN], batch.bundle_ids, batch.loss_weights > 0
        pairs = bundles_with(scored.astype(jnp.float32), ids)
        chosen, rejected = (bundle_sums(jnp.where(scored & (sign == side), scores.reward, 0), ids) for side in (1, -1))
        difference = chosen - rejected
        logits = difference
        if MARGIN in batch.signals:
            logits = difference - bundle_sums(jnp.where(scored & (sign == 1), batch.signals[MARGIN], 0), ids)
        losses = -jax.nn.log_sigmoid(logits) + self.center * (chosen + rejected) ** 2
        value = jnp.sum(jnp.where(pairs, losses, 0)) / jnp.maximum(norm.bundles, 1)
        count = jnp.sum(pairs)
        metrics: dict[str, Metric] = {
            "loss": Mean(value * norm.bundles, count),
            "accuracy": mean_where(pairs, difference > 0),
            "margin": mean_where(pairs, difference),
        }
        return value, metrics | _reward_metrics(scores.reward, scored)


@dataclass(frozen=True, kw_only=True)
class PointwiseReward:
    """A text's reward is fitted to its `label`: `regression` by the squared error, `binary` by the cross-entropy of
    s(reward). Mean over the texts, or over all steps."""

    kind: Literal["regression", "binary"] = "regression"

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return (Reward(),)

    @property
    def signals(self) -> tuple[str, ...]:
        return (LABEL,)

    @property
    def separable(self) -> bool:
        return True

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        rewards, labels, scored = scores.reward, batch.signals[LABEL].astype(jnp.float32), batch.loss_weights > 0
        if self.kind == "regression":
            losses = (rewards - labels) ** 2
        else:
            losses = -labels * jax.nn.log_sigmoid(rewards) - (1 - labels) * jax.nn.log_sigmoid(-rewards)
        value = jnp.sum(jnp.where(scored, losses, 0)) / jnp.maximum(norm.tokens, 1)
        count = jnp.sum(scored)
        metrics: dict[str, Metric] = {"loss": Mean(value * norm.tokens, count)}
        if self.kind == "binary":
            metrics["accuracy"] = Mean(jnp.sum(scored & ((rewards > 0) == (labels > 0.5))), count)
        return value, metrics | _reward_metrics(rewards, scored)


def _reward_metrics(rewards: Array, scored: Array) -> dict[str, Metric]:
    return {
        "min_reward": Min(jnp.min(jnp.where(scored, rewards, jnp.inf))),
        "mean_reward": mean_where(scored, rewards),
        "max_reward": Max(jnp.max(jnp.where(scored, rewards, -jnp.inf))),
    }
