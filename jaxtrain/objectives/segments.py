"""Sums over the segments of packed rows: what losses of whole sequences need."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxtrain.types import Array


def segment_sums(values: Array, segment_ids: Array) -> Array:
    """[B, T] -> [B, T]: at every token, the sum over its segment. Padding, segment 0, sums up too."""
    length = values.shape[1]

    def of_row(row: Array, segments: Array) -> Array:
        return jax.ops.segment_sum(row, segments, length + 1)[segments]

    return jax.vmap(of_row)(values, segment_ids)


def segment_means(values: Array, weights: Array, segment_ids: Array) -> Array:
    """[B, T] -> [B, T]: at every token, the weighted mean over its segment; 0 where the segment carries no weight."""
    sizes = segment_sums(weights, segment_ids)
    return segment_sums(values * weights, segment_ids) / jnp.where(sizes == 0, 1, sizes)
