"""Supervised fine-tuning: the negative log-likelihood of the weighted tokens."""

from __future__ import annotations

import jax.numpy as jnp

from jaxtrain.types import Array, Batch, Mean, Norm, TokenScores


def sft_loss(scores: TokenScores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Mean]]:
    """Mean of -logp over the weighted tokens of the global batch, and TRL's metrics of them."""
    weights = batch.loss_weights
    count = jnp.sum(weights)
    nll = -jnp.sum(scores.logp * weights)
    metrics = {
        "loss": Mean(nll, count),
        "mean_token_accuracy": Mean(jnp.sum(scores.correct * weights), count),
        "entropy": Mean(jnp.sum(scores.entropy * weights), count),
    }
    return nll / jnp.maximum(norm.tokens, 1), metrics
