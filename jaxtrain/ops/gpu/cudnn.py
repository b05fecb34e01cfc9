"""cuDNN's fused attention over packed rows, on Hopper GPUs and later.

JAX's public `dot_product_attention` takes segments only as a mask [T, T]. The private function that it calls takes the
start and length of every segment and skips pairs of tokens of different segments. Not run on a GPU yet, so
`impl="auto"` does not select it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from jaxtrain.ops.blockwise import AttentionOptions
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array

# The kernel's statistics are float32 [B, segments, N, T], so the limit bounds their memory.
MAX_SEGMENTS = 64


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Integer[Array, "B T"],
    options: AttentionOptions,
    *,
    mesh: Mesh | None,
    fallback: Callable[[Array, Array, Array, Array], Array],
) -> Float[Array, "B T N H"]:
    """Attention within packed rows, in 16-bit floats; see `attend`.

    `fallback(q, k, v, segment_ids)` computes the same for rows of more than `MAX_SEGMENTS` segments.
    """

    def rows(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        starts, lengths, count = segment_table(segment_ids, MAX_SEGMENTS)
        fused = partial(_fused, starts=starts, lengths=lengths, options=options)
        fits = count.max() <= MAX_SEGMENTS
        return jax.lax.cond(fits, fused, lambda q, k, v: fallback(q, k, v, segment_ids), q, k, v)

    if mesh is None or mesh.size == 1:
        return rows(q, k, v, segment_ids)
    heads = P(ROWS, None, "tensor")
    return jax.shard_map(rows, mesh=mesh, in_specs=(heads, heads, heads, P(ROWS)), out_specs=heads, check_vma=False)(
        q, k, v, segment_ids
    )


def segment_table(
    segment_ids: Integer[Array, "B T"], limit: int
) -> tuple[Integer[jax.Array, "B {limit+1}"], Integer[jax.Array, "B {limit}"], Integer[jax.Array, " B"]]:
    """Runs of equal ids: their starts, their lengths (both -1 after the last run) and their counts."""
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
    options: AttentionOptions,
) -> jax.Array:
    # JAX computes the strides of keys from the number of query heads, so keys and values must have as many heads.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=options.scale,
        mask_type=MaskType.PADDING_CAUSAL,
        sliding_window_length=options.window,
    )
    assert isinstance(out, jax.Array)  # a tuple only if residuals are requested
    return out
