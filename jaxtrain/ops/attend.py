"""Attention over packed rows: one entry, several kernels, and no caller ever builds a mask."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxtrain.ops.blockwise import Form, Tokens, blockwise_attention
from jaxtrain.ops.gpu.cudnn import cudnn_attention
from jaxtrain.ops.tpu.splash import splash_attention
from jaxtrain.parallel.mesh import platform_of

Impl = Literal["auto", "xla", "splash", "cudnn"]

_BLOCK = 128  # queries whose scores exist at once, outside the fused kernels


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_pos: jax.Array,
    q_seg: jax.Array,
    kv_pos: jax.Array | None = None,
    kv_seg: jax.Array | None = None,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    impl: Impl = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Grouped-query attention, causal by position and within a segment, softmax in float32.

    q [B, T, N, H], k and v [B, S, K, H] with N a multiple of K -> [B, T, N, H]. A query sees the keys of its own
    segment that stand at its position or before it, at most `window - 1` tokens before it. Segment 0 is padding: a
    segment like any other, so its outputs are finite and nothing else sees it.

    Packed rows: leave `kv_pos` and `kv_seg` [B, S] out where the keys are the queries' own tokens. Tokens of a segment
    then stand side by side in the order of their positions, and keys behind a block of queries are never computed.
    A cache gives both. A query that sees no key at all gets 0.

    `softcap` bends the scores as softcap * tanh(score / softcap) (Gemma 2); `sinks` [N] are scores of a key without
    value that every query of a head sees (GPT-OSS).

    `impl="auto"` is the best kernel for the platform of `mesh`, or of JAX's default device without one: splash
    attention on TPU for packed rows, plain XLA elsewhere. Splash attention runs interpreted, for tests, off TPU.

    Raises ValueError for shapes that do not fit together and for kernels that cannot do what is asked.
    """
    _check(q, k, v, kv_pos, kv_seg, window)
    packed = kv_pos is None
    platform = platform_of(mesh)
    if impl == "auto":
        impl = "splash" if platform == "tpu" and packed else "xla"
    if impl in ("splash", "cudnn") and not packed:
        raise ValueError(f"impl={impl!r} attends within packed rows only: leave kv_pos and kv_seg out, or use 'xla'")
    if impl == "splash":
        return splash_attention(
            q,
            k,
            v,
            q_seg,
            window=window,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            mesh=mesh,
            interpret=platform != "tpu",
        )
    form = Form(scale, window, softcap, packed, _BLOCK)
    if impl == "cudnn":
        if softcap is not None or sinks is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"impl='cudnn' takes 16-bit floats (here {q.dtype}), no softcap and no sinks; use 'xla'")
        if platform != "gpu":
            raise ValueError(f"impl='cudnn' needs a GPU, not {platform}; use 'auto'")

        def otherwise(q: jax.Array, k: jax.Array, v: jax.Array, seg: jax.Array) -> jax.Array:
            index = jnp.broadcast_to(jnp.arange(seg.shape[1]), seg.shape)  # within packed rows as good as positions
            return blockwise_attention(q, k, v, None, Tokens(index, seg, index, seg), form)

        return cudnn_attention(q, k, v, q_seg, window=window, scale=scale, mesh=mesh, otherwise=otherwise)
    tokens = Tokens(q_pos, q_seg, q_pos if kv_pos is None else kv_pos, q_seg if kv_seg is None else kv_seg)
    return blockwise_attention(q, k, v, sinks, tokens, form)


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_pos: jax.Array | None, kv_seg: jax.Array | None, window: int | None
) -> None:
    if q.ndim != 4 or k.shape != v.shape or k.shape[::3] != q.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attend: q {q.shape}, k {k.shape}, v {v.shape} are not [B, T, N, H] and twice [B, S, K, H] with N % K == 0"
        )
    if (kv_pos is None) != (kv_seg is None):
        raise ValueError("attend: give both kv_pos and kv_seg (a cache) or neither (packed rows)")
    if kv_pos is None and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attend: {k.shape[1]} keys for {q.shape[1]} queries of packed rows; a cache needs kv_pos, kv_seg"
        )
    if window is not None and window < 1:
        raise ValueError(f"attend: window={window}; a token sees at least itself, so the least window is 1")
