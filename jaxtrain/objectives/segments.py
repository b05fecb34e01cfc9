"""Values of the segments, bundles and groups of tokens in packed rows.

Segments are sequences, bundles are pairs of them, and groups are tokens of a segment that write the same text as tokens
of another tokenizer (`data.alignment`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer

from jaxtrain.types import GROUP_PLACE, TEACHER_SHIFT, Array, Batch, Scores


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


def group_probs(scores: Scores, places: Integer[Array, "B T"]) -> Float[Array, "B T K"]:
    """At the first token of each group, its `top_logps` probabilities in descending order and their rest: K = k + 1.

    They are those of the first token times the probabilities of the further ones, and so sum to the product of these.
    `places` are those of the tokens within their groups, 1, 2 ...; 0 in no group. 0 at all other tokens.
    """
    first = places == 1
    further = jnp.exp(further_logps(scores.logp, places))[..., None]
    probs = jnp.exp(scores.top_logps) * further
    rest = jnp.maximum(further - probs.sum(2, keepdims=True), 0)
    return jnp.where(first[..., None], jnp.concatenate([probs, rest], 2), 0)


def further_logps(logp: Float[Array, "B T"], places: Integer[Array, "B T"]) -> Float[Array, "B T"]:
    """At every token of a group, the log-probability of the tokens of it after its first one; 0 in no group."""
    groups = jnp.where(places > 0, jnp.cumsum(places == 1, 1), 0)
    return segment_sums(jnp.where(places > 1, logp, 0), groups)


def to_student(teacher: Float[Array, "B T K"], batch: Batch) -> Float[Array, "B T K"]:
    """The values at the teacher's first tokens of the groups, moved to the student's; 0 elsewhere."""
    first = batch.signals[GROUP_PLACE] == 1
    at = jnp.where(first, jnp.arange(first.shape[1]) + batch.signals[TEACHER_SHIFT], 0)
    return jnp.where(first[..., None], jnp.take_along_axis(teacher, at[..., None], 1), 0)
