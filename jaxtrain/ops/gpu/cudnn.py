"""cuDNN's fused attention over packed rows, on Hopper GPUs and later.

JAX's public `dot_product_attention` knows segments only as a mask of [T, T]; the function below it takes the place and
length of every segment instead, and skips what lies between segments. Not yet run on a GPU: `auto` does not choose it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.sharding import ROWS

# The kernel's statistics are [B, segments, N, T] in float32, so the limit is a matter of memory.
MAX_SEGMENTS = 64


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    scale: float,
    mesh: Mesh | None,
    otherwise: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Attention within packed rows: q [B, T, N, H], k and v [B, T, K, H] in 16 bits -> [B, T, N, H].

    `otherwise(q, k, v, segment_ids)` computes the same for rows of more than `MAX_SEGMENTS` segments.
    """

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        starts, lengths, count = segment_table(segment_ids, MAX_SEGMENTS)
        fused = partial(_fused, starts=starts, lengths=lengths, window=window, scale=scale)
        fits = count.max() <= MAX_SEGMENTS
        return jax.lax.cond(fits, fused, lambda q, k, v: otherwise(q, k, v, segment_ids), q, k, v)

    if mesh is None or mesh.size == 1:
        return rows(q, k, v, segment_ids)
    heads = P(ROWS, None, "tensor")
    return jax.shard_map(rows, mesh=mesh, in_specs=(heads, heads, heads, P(ROWS)), out_specs=heads, check_vma=False)(
        q, k, v, segment_ids
    )


def segment_table(segment_ids: jax.Array, limit: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs of equal ids in [B, T]: starts [B, limit + 1], lengths [B, limit] (-1 after the last run) and counts [B]."""
    length = segment_ids.shape[1]
    opens = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    count = opens.sum(1, dtype=jnp.int32)
    find = partial(jnp.nonzero, size=limit + 1, fill_value=length)
    starts = jax.vmap(lambda row: find(row)[0])(opens).astype(jnp.int32)
    real = jnp.arange(limit) < count[:, None]
    lengths = jnp.where(real, jnp.diff(starts, axis=1), -1)
    return jnp.where(starts < length, starts, -1), lengths, count


def _fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    starts: jax.Array,
    lengths: jax.Array,
    window: int | None,
    scale: float,
) -> jax.Array:
    # JAX takes the stride of a key from the queries' heads, so keys and values must have as many.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=window,
    )
    assert isinstance(out, jax.Array)  # it is a tuple only where residuals are asked for
    return out
