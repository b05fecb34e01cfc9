"""DPO as a user of the library would add it: Rafailov et al. 2023 (arXiv:2305.18290)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtrain.objectives.objective import Logp
from jaxtrain.objectives.segments import segment_sums
from jaxtrain.types import Mean


@dataclass(frozen=True)
class DPO:
    """-log sigmoid(beta (chosen - rejected)), of log-probabilities minus those of the reference; mean over pairs."""

    beta: float = 0.1

    @property
    def needs(self):
        return (Logp(),)

    @property
    def signals(self):
        return "sign", "ref_logps"

    @property
    def separable(self):
        return False

    def __call__(self, scores, batch, norm):
        signals = batch.signals
        rewards = (scores.logp - signals["ref_logps"]) * batch.loss_weights * signals["sign"]
        margins = self.beta * segment_sums(rewards, batch.bundle_ids)
        before = jnp.pad(batch.bundle_ids, ((0, 0), (1, 0)))[:, :-1]
        first = (batch.bundle_ids > 0) & (batch.bundle_ids != before)  # each pair counts once
        losses = jnp.sum(jnp.where(first, -jax.nn.log_sigmoid(margins), 0))
        pairs = jnp.sum(first)
        metrics = {
            "loss": Mean(losses, pairs),
            "rewards/accuracies": Mean(jnp.sum(first & (margins > 0)), pairs),
            "rewards/margins": Mean(jnp.sum(jnp.where(first, margins, 0)), pairs),
        }
        return losses / jnp.maximum(norm.segments / 2, 1), metrics
