"""Exact attention in plain XLA for any platform, one block of queries at a time.

The backward pass recomputes the probabilities from the saved log-sum-exp (Dao et al. 2022, "FlashAttention", section
3.1 and appendix B), so no array of size [T, S] is saved, with or without rematerialisation.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.types import Array

RESIDUALS = "attention"
"""The checkpoint name of the residuals of attention, for remat policies that save them: the outputs and one float per
head and token. Recomputing the other residuals is cheap; recomputing the attention is not."""

# Masked scores are finite, so that differences of them are not NaN. They are far below `_FLOOR`, the smallest row
# maximum, so that the weights and the output of a query that attends to no key are exactly 0.
_MASKED = -1e30
_FLOOR = -1e20

# With more bands, more of the masked keys are skipped, and more code is compiled.
_BANDS = 8


class MaskInputs(NamedTuple):
    """Positions and segment ids of the queries [B, T] and of the keys [B, S].

    Without those of the keys the rows are packed: the keys are those of the same tokens as the queries, so a query
    attends to no later key of the row.
    """

    q_pos: Array
    q_seg: Array
    kv_pos: Array | None = None
    kv_seg: Array | None = None
    prefix: Array | None = None  # [B, T] of the queries of packed rows: `Batch.prefix_ids`

    @property
    def packed(self) -> bool:
        return self.kv_pos is None


class SplashBlocks(NamedTuple):
    """Blocks of splash attention in tokens, multiples of 128; smaller ones are used if these do not divide a row."""

    block_q: int = 1024
    block_kv: int = 1024
    block_kv_compute: int = 512  # keys of a block that are computed at a time
    backward_block_kv: int = 2048  # of the fused backward kernel
    fused_backward: bool = True  # one kernel for all gradients of causal rows: see `ops.tpu.splash`


class AttentionOptions(NamedTuple):
    """Compile-time constants of a layer's attention."""

    scale: float  # of the products of queries and keys
    window: int | None = None  # a query attends to so many keys, its own among them; None: to all before it
    softcap: float | None = None  # a score is softcap * tanh(score / softcap)
    block: int = 128  # queries per block, outside the fused kernels
    splash: SplashBlocks = SplashBlocks()


class _Band(NamedTuple):
    """A range of blocks: queries [start, stop) and the keys [first, last) that any of them may attend to."""

    start: int
    stop: int
    first: int
    last: int


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    sinks: Float[Array, " N"] | None,
    tokens: MaskInputs,
    options: AttentionOptions,
) -> Float[Array, "B T N V"]:
    """Attention over packed rows or a cache; see `attend` for the mask."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    options = options._replace(block=min(options.block, length))
    padding = -length % options.block
    if padding:
        pad = partial(_pad_rows, padding=padding)
        q, tokens = pad(q), tokens._replace(q_pos=pad(tokens.q_pos), q_seg=pad(tokens.q_seg, fill=-1))
        if tokens.prefix is not None:
            tokens = tokens._replace(prefix=pad(tokens.prefix))
        if tokens.packed:
            k, v = pad(k), pad(v)
    # Heads before tokens: the products of a block are then plain batched matmuls, which need no copies.
    grouped = q.reshape(batch, length + padding, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    out: Array = _attention(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), _group(sinks, kv_heads), tokens, options)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length + padding, heads, v.shape[3])[:, :length]


def _pad_rows(x: Array, padding: int, fill: int = 0) -> Array:
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _group(sinks: Array | None, kv_heads: int) -> Array | None:
    return None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, sinks, tokens: MaskInputs, options: AttentionOptions) -> Array:
    """q [B, K, G, T, H], k [B, K, S, H], v [B, K, S, V], sinks [1, K, G, 1] -> [B, K, G, T, V]."""
    return _forward(q, k, v, sinks, tokens, options)[0]


def _forward(q, k, v, sinks, tokens: MaskInputs, options: AttentionOptions):
    def block(keys: Keys, query: Query) -> tuple[Array, Array]:
        scores, _ = _scores_and_slope(query, keys, options)
        top = jnp.maximum(scores.max(-1), _FLOOR)
        if sinks is not None:
            top = jnp.maximum(top, sinks)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(-1)
        if sinks is not None:
            total += jnp.exp(sinks - top)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), keys.v, preferred_element_type=jnp.float32)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

    outs, sums = [], []
    for band in _bands(q.shape[3], k.shape[2], tokens, options):
        out, lse = jax.lax.map(partial(block, _keys(k, v, tokens, band)), _queries(q, tokens, band, options.block))
        outs.append(_merge_blocks(out))
        sums.append(_merge_blocks(lse))
    out, lse = (checkpoint_name(jnp.concatenate(parts, 3), RESIDUALS) for parts in (outs, sums))
    return out, (q, k, v, sinks, tokens, out, lse)


def _backward(options: AttentionOptions, saved, d_out: Array):
    q, k, v, sinks, tokens, out, lse = saved
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def block(keys: Keys, carry, inputs):
        d_k, d_v = carry
        query, d_out, lse, delta = inputs
        scores, slope = _scores_and_slope(query, keys, options)
        weights = jnp.exp(scores - lse[..., None])
        d_v += jnp.einsum("bkgts,bkgth->bksh", weights.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum("bkgth,bksh->bkgts", d_out, keys.v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta[..., None]) * slope).astype(q.dtype)
        d_q = jnp.einsum("bkgts,bksh->bkgth", d_scores, keys.k, preferred_element_type=jnp.float32)
        d_k += jnp.einsum("bkgts,bkgth->bksh", d_scores, query.q, preferred_element_type=jnp.float32)
        return (d_k, d_v), d_q.astype(q.dtype)

    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for band in _bands(q.shape[3], k.shape[2], tokens, options):
        keys = _keys(k, v, tokens, band)
        split = partial(_split_blocks, band=band, block=options.block, axis=3)
        inputs = (_queries(q, tokens, band, options.block), split(d_out), split(lse), split(delta))
        zeros = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
        (band_k, band_v), d_q = jax.lax.scan(partial(block, keys), zeros, inputs)
        d_qs.append(_merge_blocks(d_q))
        d_k = d_k.at[:, :, band.first : band.last].add(band_k)
        d_v = d_v.at[:, :, band.first : band.last].add(band_v)
    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks - lse) * delta).sum((0, 3), keepdims=True)
    return jnp.concatenate(d_qs, 3), d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks, None


_attention.defvjp(_forward, _backward)


class Query(NamedTuple):
    """A block of queries: q [B, K, G, t, H], positions and segment ids [B, t]."""

    q: Array
    pos: Array
    seg: Array
    prefix: Array | None  # segment ids [B, t]


class Keys(NamedTuple):
    """The keys of a band: k and v [B, K, s, H], positions and segment ids [B, s]."""

    k: Array
    v: Array
    pos: Array
    seg: Array


def _scores_and_slope(query: Query, keys: Keys, options: AttentionOptions) -> tuple[Array, Array | float]:
    """float32 scores [B, K, G, t, s], masked, and their derivative by the product q . k."""
    scores = jnp.einsum("bkgth,bksh->bkgts", query.q, keys.k, preferred_element_type=jnp.float32) * options.scale
    slope = options.scale
    if options.softcap is not None:
        tanh = jnp.tanh(scores / options.softcap)
        scores, slope = options.softcap * tanh, options.scale * (1 - tanh * tanh)
    distance = query.pos[:, :, None] - keys.pos[:, None, :]
    visible = query.seg[:, :, None] == keys.seg[:, None, :]
    if query.prefix is not None:
        visible |= (query.prefix[:, :, None] == keys.seg[:, None, :]) & (query.prefix > 0)[:, :, None]
    visible &= distance >= 0
    if options.window is not None:
        visible &= distance < options.window
    return jnp.where(visible[:, None, None], scores, _MASKED), slope


def _bands(length: int, keys: int, tokens: MaskInputs, options: AttentionOptions) -> Iterator[_Band]:
    if not tokens.packed:
        yield _Band(0, length, 0, keys)
        return
    size = -(-length // (_BANDS * options.block)) * options.block
    for start in range(0, length, size):
        stop = min(start + size, length)
        # Between the tokens of a segment and those that it continues there may be others.
        window = None if tokens.prefix is not None else options.window
        first = 0 if window is None else max(0, start - window + 1)
        yield _Band(start, stop, first, stop)


def _keys(k: Array, v: Array, tokens: MaskInputs, band: _Band) -> Keys:
    span = slice(band.first, band.last)
    pos = tokens.q_pos if tokens.kv_pos is None else tokens.kv_pos
    seg = tokens.q_seg if tokens.kv_seg is None else tokens.kv_seg
    return Keys(k[:, :, span], v[:, :, span], pos[:, span], seg[:, span])


def _queries(q: Array, tokens: MaskInputs, band: _Band, block: int) -> Query:
    split = partial(_split_blocks, band=band, block=block)
    prefix = None if tokens.prefix is None else split(tokens.prefix, axis=1)
    return Query(split(q, axis=3), split(tokens.q_pos, axis=1), split(tokens.q_seg, axis=1), prefix)


def _split_blocks(x: Array, band: _Band, block: int, axis: int) -> Array:
    """The band's part of an axis of length T, as [blocks, ..., block, ...]."""
    x = jax.lax.slice_in_dim(x, band.start, band.stop, axis=axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _merge_blocks(blocks: Array) -> Array:
    """[blocks, B, K, G, block, ...] -> [B, K, G, T, ...]."""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
