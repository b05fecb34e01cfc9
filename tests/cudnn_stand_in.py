"""A stand-in for cuDNN's two kernels over packed rows, in float32.

The backward one knows of the softmax only the log-sum-exp and the output that it is given, as cuDNN's does.
"""

import jax
import jax.numpy as jnp


def install(monkeypatch, kernels):
    """Replace the rules of JAX's module by the stand-in."""
    monkeypatch.setattr(kernels, "_dot_product_attention_fwd_rule", forward)
    monkeypatch.setattr(kernels, "_dot_product_attention_bwd_rule", backward)
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91400)


def _scores(q, k, starts, scale, window):
    column = jnp.arange(q.shape[1])
    first = jnp.where(starts[:, :-1] < 0, q.shape[1], starts[:, :-1])  # [B, segments]
    segment = (column[None, :, None] >= first[:, None]).sum(-1) - 1  # [B, T]
    place = column - jnp.take_along_axis(first, segment, 1)
    distance = column[:, None] - column
    seen = (segment[:, :, None] == segment[:, None]) & (distance >= 0) & (distance < (window or q.shape[1]))
    products = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    return jnp.where(seen[:, None], products, -1e30), segment, place


def forward(q, k, v, *rest):
    """`rest`: bias, lengths and starts of the segments, page tables, and the constants."""
    _, lengths, _, starts, *_, scale, _, _, _, _, _, window, _, _ = rest
    wide = [each.astype(jnp.float32) for each in (q, k, v)]
    scores, segment, place = _scores(*wide[:2], starts, scale, window)
    lse = jax.nn.logsumexp(scores, -1)  # [B, N, T]
    out = jnp.einsum("bnts,bsnh->btnh", jnp.exp(scores - lse[..., None]), wide[2], precision="highest").astype(q.dtype)
    rows, heads, length = lse.shape
    stats = jnp.full((rows, lengths.shape[1], heads, length), jnp.nan)
    stats = stats.at[jnp.arange(rows)[:, None], segment, :, place].set(lse.swapaxes(1, 2))
    stats = stats.reshape(-1, heads, length)
    return out, (q, k, v, *rest[:7], stats, out)


def backward(*arguments):
    scale, *_, window, _, _, saved, g = arguments
    q, k, v, *_, starts, _, _, stats, out = saved
    dtype = q.dtype
    q, k, v, out, g = (each.astype(jnp.float32) for each in (q, k, v, out, g))
    scores, segment, place = _scores(q, k, starts, scale, window)
    rows = jnp.arange(len(q))[:, None]
    lse = stats.reshape(len(q), -1, *stats.shape[1:])[rows, segment, :, place].swapaxes(1, 2)
    p = jnp.exp(scores - lse[..., None])
    d_p = jnp.einsum("btnh,bsnh->bnts", g, v, precision="highest")
    d_s = p * (d_p - (out * g).sum(-1).swapaxes(1, 2)[..., None]) * scale
    d_q, d_k = jnp.einsum("bnts,bsnh->btnh", d_s, k), jnp.einsum("bnts,btnh->bsnh", d_s, q)
    d_v = jnp.einsum("bnts,btnh->bsnh", p, g, precision="highest")
    return *(each.astype(dtype) for each in (d_q, d_k, d_v)), None
