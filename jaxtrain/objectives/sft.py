"""Supervised fine-tuning: the negative log-likelihood of the weighted tokens."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float

from jaxtrain.objectives.objective import Correct, Entropy, Logp, ScoreRequest
from jaxtrain.types import Array, Batch, Mean, Norm, Scores


@dataclass(frozen=True)
class SFT:
    """Mean of -logp over the weighted tokens of the global batch, and TRL's metrics of them."""

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(), Entropy(), Correct()

    @property
    def signals(self) -> tuple[str, ...]:
        return ()

    @property
    def separable(self) -> bool:
        return True

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Mean]]:
        weights = batch.loss_weights
        count = jnp.sum(weights)
        nll = -jnp.sum(scores.logp * weights)
        metrics = {
            "loss": Mean(nll, count),
            "mean_token_accuracy": Mean(jnp.sum(scores.correct * weights), count),
            "entropy": Mean(jnp.sum(scores.entropy * weights), count),
        }
        return nll / (norm.tokens + (norm.tokens == 0)), metrics
