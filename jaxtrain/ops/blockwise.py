"""Exact attention in plain XLA, block of queries by block of queries, for any platform.

The backward pass computes the probabilities again from the saved log-sum-exp (Dao et al. 2022, "FlashAttention",
section 3.1 and appendix B), so nothing of size [T, S] outlives a block, with or without rematerialisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

RESIDUALS = "attention"
"""Names what the backward pass needs of the forward pass, so that a remat policy can save it: the outputs and one float
a head and token. Everything else is cheap to compute again, and the attention itself is not."""

# Masked scores are finite so that no difference of two of them is NaN, and far below `_FLOOR`, the least row
# maximum, so that a query which sees no key at all gets weights of exactly 0 and the output 0.
_MASKED = -1e30
_FLOOR = -1e20

# More bands skip more of the keys that nobody in them can see, and compile to more code.
_BANDS = 8


class Tokens(NamedTuple):
    """Where each token stands: positions and segments of the queries [B, T] and of the keys [B, S]."""

    q_pos: jax.Array
    q_seg: jax.Array
    kv_pos: jax.Array
    kv_seg: jax.Array


class Form(NamedTuple):
    """What is fixed when the program is compiled."""

    scale: float
    window: int | None
    softcap: float | None
    packed: bool  # keys are the queries' own tokens, in order: no query sees a key behind it in the row
    block: int  # queries of a block


class _Band(NamedTuple):
    """Queries [start, stop), in whole blocks, that share the keys [first, last)."""

    start: int
    stop: int
    first: int
    last: int


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, tokens: Tokens, form: Form
) -> jax.Array:
    """`q` [B, T, N, H], `k` and `v` [B, S, K, H], `sinks` [N] -> [B, T, N, H]; see `attend` for what is seen."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    form = form._replace(block=min(form.block, length))
    short = -length % form.block
    if short:
        pad = partial(_pad_rows, short=short)
        q, tokens = pad(q), tokens._replace(q_pos=pad(tokens.q_pos), q_seg=pad(tokens.q_seg, fill=-1))
        if form.packed:
            k, v = pad(k), pad(v)
            tokens = tokens._replace(kv_pos=pad(tokens.kv_pos), kv_seg=pad(tokens.kv_seg, fill=-1))
    # Heads before tokens: every matmul of a block is then a plain batched one, without copies of its own.
    grouped = q.reshape(batch, length + short, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    out: jax.Array = _attention(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), _group(sinks, kv_heads), tokens, form)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length + short, heads, width)[:, :length]


def _pad_rows(x: jax.Array, short: int, fill: int = 0) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)


def _group(sinks: jax.Array | None, kv_heads: int) -> jax.Array | None:
    return None if sinks is None else sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q, k, v, sinks, tokens: Tokens, form: Form) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H], sinks [1, K, G, 1] -> the shape of q."""
    return _forward(q, k, v, sinks, tokens, form)[0]


def _forward(q, k, v, sinks, tokens: Tokens, form: Form):
    def block(keys: Keys, query: Query) -> tuple[jax.Array, jax.Array]:
        scores = _scores(query, keys, form)
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
    for band in _bands(q.shape[3], k.shape[2], form):
        out, lse = jax.lax.map(partial(block, _keys(k, v, tokens, band)), _queries(q, tokens, band, form))
        outs.append(_join(out))
        sums.append(_join(lse))
    out, lse = (checkpoint_name(jnp.concatenate(parts, 3), RESIDUALS) for parts in (outs, sums))
    return out, (q, k, v, sinks, tokens, out, lse)


def _backward(form: Form, saved, d_out: jax.Array):
    q, k, v, sinks, tokens, out, lse = saved
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def block(keys: Keys, carry, inputs):
        d_k, d_v = carry
        query, d_out, lse, delta = inputs
        scores, slope = _scores_and_slope(query, keys, form)
        weights = jnp.exp(scores - lse[..., None])
        d_v += jnp.einsum("bkgts,bkgth->bksh", weights.astype(v.dtype), d_out, preferred_element_type=jnp.float32)
        d_weights = jnp.einsum("bkgth,bksh->bkgts", d_out, keys.v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta[..., None]) * slope).astype(q.dtype)
        d_q = jnp.einsum("bkgts,bksh->bkgth", d_scores, keys.k, preferred_element_type=jnp.float32)
        d_k += jnp.einsum("bkgts,bkgth->bksh", d_scores, query.q, preferred_element_type=jnp.float32)
        return (d_k, d_v), d_q.astype(q.dtype)

    d_qs, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for band in _bands(q.shape[3], k.shape[2], form):
        keys = _keys(k, v, tokens, band)
        cut = partial(_cut, band=band, block=form.block, axis=3)
        inputs = (_queries(q, tokens, band, form), cut(d_out), cut(lse), cut(delta))
        none = jnp.zeros(keys.k.shape, jnp.float32)
        (band_k, band_v), d_q = jax.lax.scan(partial(block, keys), (none, none), inputs)
        d_qs.append(_join(d_q))
        d_k = d_k.at[:, :, band.first : band.last].add(band_k)
        d_v = d_v.at[:, :, band.first : band.last].add(band_v)
    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks - lse) * delta).sum((0, 3), keepdims=True)
    return jnp.concatenate(d_qs, 3), d_k.astype(k.dtype), d_v.astype(v.dtype), d_sinks, None


_attention.defvjp(_forward, _backward)


class Query(NamedTuple):
    """One block of queries: q [B, K, G, t, H], pos and seg [B, t]."""

    q: jax.Array
    pos: jax.Array
    seg: jax.Array


class Keys(NamedTuple):
    """What a band of queries can see: k and v [B, K, s, H], pos and seg [B, s]."""

    k: jax.Array
    v: jax.Array
    pos: jax.Array
    seg: jax.Array


def _scores(query: Query, keys: Keys, form: Form) -> jax.Array:
    return _scores_and_slope(query, keys, form)[0]


def _scores_and_slope(query: Query, keys: Keys, form: Form) -> tuple[jax.Array, jax.Array | float]:
    """float32 scores [B, K, G, t, s], masked, and their derivative by the plain product q . k."""
    scores = jnp.einsum("bkgth,bksh->bkgts", query.q, keys.k, preferred_element_type=jnp.float32) * form.scale
    slope = form.scale
    if form.softcap is not None:
        bent = jnp.tanh(scores / form.softcap)
        scores, slope = form.softcap * bent, form.scale * (1 - bent * bent)
    distance = query.pos[:, :, None] - keys.pos[:, None, :]
    seen = (query.seg[:, :, None] == keys.seg[:, None, :]) & (distance >= 0)
    if form.window is not None:
        seen &= distance < form.window
    return jnp.where(seen[:, None, None], scores, _MASKED), slope


def _bands(length: int, keys: int, form: Form) -> Iterator[_Band]:
    if not form.packed:
        yield _Band(0, length, 0, keys)
        return
    size = -(-length // (_BANDS * form.block)) * form.block
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if form.window is None else max(0, start - form.window + 1)
        yield _Band(start, stop, first, stop)


def _keys(k: jax.Array, v: jax.Array, tokens: Tokens, band: _Band) -> Keys:
    seen = slice(band.first, band.last)
    return Keys(k[:, :, seen], v[:, :, seen], tokens.kv_pos[:, seen], tokens.kv_seg[:, seen])


def _queries(q: jax.Array, tokens: Tokens, band: _Band, form: Form) -> Query:
    cut = partial(_cut, band=band, block=form.block)
    return Query(cut(q, axis=3), cut(tokens.q_pos, axis=1), cut(tokens.q_seg, axis=1))


def _cut(x: jax.Array, band: _Band, block: int, axis: int) -> jax.Array:
    """The band of an axis of length T as [blocks, ..., block, ...]."""
    x = jax.lax.slice_in_dim(x, band.start, band.stop, axis=axis)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, block, ...] -> [B, K, G, T, ...]"""
    x = jnp.moveaxis(blocks, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
