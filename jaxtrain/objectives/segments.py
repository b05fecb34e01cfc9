"""Sums and means over the segments and bundles of packed rows, for losses of sequences and pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtrain.types import Array


def bundle_sums(values: Float[Array, "B T"], ids: Integer[Array, "B T"]) -> Float[Array, "B {values.shape[1]+1}"]:
    """At place i of a row, the sum over its tokens whose id is i; so each bundle is counted once. Padding is id 0."""
    return jax.vmap(lambda row, of_row: jax.ops.segment_sum(row, of_row, values.shape[1] + 1))(values, ids)


def bundles_with(values: Float[Array, "B T"], ids: Integer[Array, "B T"]) -> Bool[Array, "B {values.shape[1]+1}"]:
    """At place i of a row, whether `values` of bundle i have a positive sum; False at 0, which is padding."""
    return (bundle_sums(values, ids) > 0) & (jnp.arange(values.shape[1] + 1) > 0)


def segment_sums(values: Float[Array, "B T"], segment_ids: Integer[Array, "B T"]) -> Float[Array, "B T"]:
    """At every token, the sum over its segment. Padding is segment 0."""
    return jnp.take_along_axis(bundle_sums(values, segment_ids), segment_ids, 1)


def segment_means(
    values: Float[Array, "B T"], weights: Float[Array, "B T"], segment_ids: Integer[Array, "B T"]
) -> Float[Array, "B T"]:
    """At every token, the weighted mean over its segment; 0 if the weights of the segment sum to 0."""
    sizes = segment_sums(weights, segment_ids)
    return segment_sums(values * weights, segment_ids) / jnp.where(sizes == 0, 1, sizes)


def per_segment(weights: Float[Array, "B T"], segment_ids: Integer[Array, "B T"]) -> Float[Array, "B T"]:
    """The weights divided by their sum over the segment, so that each segment counts once in a weighted mean."""
    sizes = segment_sums(weights, segment_ids)
    return weights / jnp.where(sizes == 0, 1, sizes)
