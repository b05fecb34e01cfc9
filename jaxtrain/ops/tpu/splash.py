"""Splash attention (JAX's own Pallas kernel for TPU) over packed rows that lie on a mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.ops.blockwise import RESIDUALS
from jaxtrain.parallel.sharding import ROWS

_LANES = 128  # of a vector register: blocks are multiples of it

# Tokens of a block, at most. Large blocks pay the kernel's per-block overhead less often; MaxText's published v5p and
# v6e configurations use 512 to 2048, and these are the largest that fit the vector memory of v5e, v5p and v6e alike.
_BLOCK = 1024
_BLOCK_COMPUTE = 512


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    mesh: Mesh | None,
    interpret: bool,
) -> jax.Array:
    """Attention within packed rows: q [B, T, N, H], k and v [B, T, K, H], segment_ids [B, T] -> [B, T, N, H].

    Each device attends for its rows and its heads. `sinks` [N] are scores of a key without value.
    """
    attention = partial(_rows, window=window, scale=scale, softcap=softcap, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return attention(q, k, v, segment_ids, sinks)
    heads = P(ROWS, None, "tensor")
    # The compiler cannot see into the kernel, so it would gather every row onto every device.
    return jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, P(ROWS), None if sinks is None else P("tensor")),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, segment_ids, sinks)


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    sinks: jax.Array | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> jax.Array:
    length, heads = q.shape[1:3]
    short = -length % _LANES
    # Padding behind the last token is causal future to all of them, whatever its segment.
    q, k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, short)))
    attention = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([_mask(length + short, window)] * heads),
        block_sizes=_block_sizes(length + short),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    segments = kernel.SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks)
    assert isinstance(out, jax.Array)  # it is a tuple only where residuals are asked for
    return out.swapaxes(1, 2)[:, :length]


def _mask(length: int, window: int | None) -> masks.Mask:
    if window is None or window >= length:
        return masks.CausalMask((length, length))
    return masks.LocalMask((length, length), (window - 1, 0), 0)


def _block_sizes(length: int) -> kernel.BlockSizes:
    block = _largest_block(length, _BLOCK)
    compute = _largest_block(block, _BLOCK_COMPUTE)
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )


def _largest_block(length: int, limit: int) -> int:
    """The largest multiple of a register's lanes up to `limit` that divides `length`."""
    return max(block for block in range(_LANES, min(length, limit) + 1, _LANES) if length % block == 0)
