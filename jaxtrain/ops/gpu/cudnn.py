"""cuDNN's fused attention over packed rows, on Hopper GPUs and later.

JAX's public `dot_product_attention` takes segments only as a mask [T, T]. The private module behind it takes the start
and length of every segment and skips pairs of tokens of different segments. Its forward and backward rules are called
here instead of its function, so that remat policies see the residuals by name and sinks have a gradient. They have the
same arguments in jax 0.10 and 0.11; `parity.py` compares them with XLA before `attention: auto` uses them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as kernels
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from jaxtrain.ops.blockwise import RESIDUALS, AttentionOptions
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array

# The kernel's statistics are float32 [B, segments, N, T], so the limit bounds their memory.
MAX_SEGMENTS = 64

_SEED, _DROPOUT, _NO_BIAS = 42, 0.0, (False, False)  # the rules take them in any case


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Integer[Array, "B T"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | None,
    fallback: Callable[[Array, Array, Array, Array, Array | None], Array],
) -> Float[Array, "B T N H"]:
    """Attention within packed rows, in 16-bit floats; see `attend`.

    `fallback(q, k, v, segment_ids, sinks)` computes the same for rows of more than `MAX_SEGMENTS` segments.
    """

    def rows(q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None) -> Array:
        fits = segment_table(segment_ids, MAX_SEGMENTS)[2].max() <= MAX_SEGMENTS
        return jax.lax.cond(
            fits,
            lambda q, k, v, sinks: packed_attention(q, k, v, segment_ids, sinks, options, MAX_SEGMENTS),
            lambda q, k, v, sinks: fallback(q, k, v, segment_ids, sinks),
            *(q, k, v, sinks),
        )

    if mesh is None or mesh.size == 1:
        return rows(q, k, v, segment_ids, sinks)
    heads = P(ROWS, None, "tensor")
    in_specs = (heads, heads, heads, P(ROWS), None if sinks is None else P("tensor"))
    shards = jax.shard_map(rows, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False)
    return shards(q, k, v, segment_ids, sinks)


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


def packed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Integer[Array, "B T"],
    sinks: Float[Array, " N"] | None,
    options: AttentionOptions,
    limit: int,
) -> Float[Array, "B T N H"]:
    """The attention of rows of at most `limit` segments, on one device."""
    # JAX computes the strides of keys from the number of query heads, so keys and values must have as many heads.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return _attention((options, limit), q, k, v, segment_ids, sinks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    static: tuple[AttentionOptions, int], q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None
) -> Array:
    return _forward(static, q, k, v, segment_ids, sinks)[0]


def _forward(
    static: tuple[AttentionOptions, int], q: Array, k: Array, v: Array, segment_ids: Array, sinks: Array | None
) -> tuple[Array, Any]:
    """A sink adds exp(sink) to the sum of the softmax, so the output shrinks by sigmoid(lse - sink).

    The backward kernel finds the probabilities as exp(score - lse), and their mean from the output: given the lse with
    the sink in it and the shrunk output, it computes the gradients of the attention with the sink.
    """
    options, limit = static
    starts, lengths, _ = segment_table(segment_ids, limit)
    unused = jnp.zeros(0, q.dtype)
    arrays = (q, k, v, unused, lengths, lengths, starts, starts, unused, unused)
    version = kernels.check_cudnn_version()
    out, residuals = kernels._dot_product_attention_fwd_rule(
        *arrays, options.scale, _SEED, _DROPOUT, _NO_BIAS, *_mask(options), version, False
    )
    assert isinstance(out, jax.Array)  # a tuple only if residuals are requested
    stats = residuals[-2]  # [B * limit, N, T]: the lse of a token, at its place within its segment
    lse = None
    if sinks is not None:
        lse = _by_token(stats, segment_ids, starts)
        out = (out * jax.nn.sigmoid(lse - sinks)[..., None]).astype(q.dtype)
        stats, lse = jnp.logaddexp(stats, sinks[:, None]), jnp.logaddexp(lse, sinks)
    out, stats, lse = (None if each is None else checkpoint_name(each, RESIDUALS) for each in (out, stats, lse))
    assert out is not None
    return out, ((*arrays, stats, out), sinks, lse)


def _backward(static: tuple[AttentionOptions, int], saved: Any, d_out: Array) -> tuple[Array | None, ...]:
    options, _ = static
    residuals, sinks, lse = saved
    d_q, d_k, d_v, *_ = kernels._dot_product_attention_bwd_rule(
        options.scale, _SEED, _DROPOUT, _NO_BIAS, *_mask(options), True, False, residuals, d_out
    )
    if sinks is None:
        return d_q, d_k, d_v, None, None
    mean = (residuals[-1].astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    return d_q, d_k, d_v, None, -(jnp.exp(sinks - lse) * mean).sum((0, 1))


_attention.defvjp(_forward, _backward)


def _mask(options: AttentionOptions) -> tuple[Any, int, int | None]:
    return kernels.MaskType.PADDING_CAUSAL, kernels.AttentionLayout.BTNH.value, options.window


def _by_token(stats: Array, segment_ids: Array, starts: Array) -> Float[Array, "B T N"]:
    rows, length = segment_ids.shape
    opens = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    segment = jnp.cumsum(opens, axis=1)
    place = jnp.arange(length) - jnp.take_along_axis(starts, segment, 1)
    by_row = stats.reshape(rows, -1, *stats.shape[1:])
    return by_row[jnp.arange(rows)[:, None], segment, :, place]
