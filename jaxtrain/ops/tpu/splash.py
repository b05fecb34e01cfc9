"""Splash attention (JAX's Pallas kernel for TPU) over packed rows, sharded over a mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from jaxtrain.ops.blockwise import RESIDUALS, AttentionOptions, SplashBlocks
from jaxtrain.ops.context import PartKernel, attend_in_parts, query_order
from jaxtrain.parallel.sharding import CONTEXT, ROWS, context_shards
from jaxtrain.types import Array

_LANES = 128  # lanes of a vector register: blocks are multiples of it

# Tokens of rows up to which the backward pass is one fused kernel. It computes five products instead of seven, and
# writes the gradient of the queries once for every block of keys: its memory grows with the square of the length.
_FUSED_LENGTH = 16384


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Integer[Array, "B T"],
    options: AttentionOptions,
    *,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Attention within packed rows; see `attend`. Each device computes its rows, its heads and its queries.

    Raises ValueError if the tokens of a row are sharded over `CONTEXT` and do not divide into two blocks of whole
    registers for each device.
    """
    if mesh is not None and context_shards(mesh) > 1:
        return _parts(q, k, v, segment_ids, options, sinks=sinks, mesh=mesh, interpret=interpret)
    attention = partial(_rows, options=options, interpret=interpret)
    if mesh is None or mesh.size == 1:
        return attention(q, k, v, segment_ids, sinks)
    heads = P(ROWS, None, "tensor")
    # The kernel is opaque to the compiler, which would gather all rows onto all devices.
    return jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, P(ROWS), None if sinks is None else P("tensor")),
        out_specs=heads,
        check_vma=False,
    )(q, k, v, segment_ids, sinks)


def _parts(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    options: AttentionOptions,
    *,
    sinks: Array | None,
    mesh: Mesh,
    interpret: bool,
) -> Array:
    """The attention of rows whose tokens are sharded."""
    (length, heads), devices = q.shape[1:3], context_shards(mesh)
    if length % (2 * devices * _LANES):
        raise ValueError(
            f"rows of {length} tokens over mesh.context={devices}: splash attention takes multiples of "
            f"{2 * devices * _LANES} tokens, two blocks of {_LANES} for each device; choose another data.row_length"
        )
    order = query_order(length, devices)
    blocks = _block_sizes(length // devices // 2, length, options.splash._replace(fused_backward=False))
    attention = _kernel(order, heads // mesh.shape["tensor"], blocks, options, devices=devices, interpret=interpret)
    spec = attention.manual_sharding_spec(NamedSharding(mesh, P(None, CONTEXT)))

    def part(
        attention: kernel.SplashAttentionKernel,
        q: Array,
        ids: Any,
        k: Array,
        v: Array,
        all_ids: Any,
        sinks: Array | None,
    ) -> Array:
        return _attended(attention, q * options.scale, k, v, kernel.SegmentIds(ids, all_ids), sinks)

    return attend_in_parts(PartKernel(part, order, attention, spec), q, k, v, segment_ids, sinks, mesh=mesh)


def _rows(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    sinks: Array | None,
    *,
    options: AttentionOptions,
    interpret: bool,
) -> Array:
    length, heads = q.shape[1:3]
    padding = -length % _LANES
    padded = length + padding
    # The causal mask hides padding after the last token from all tokens, in any segment.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q * options.scale, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    causal = options.window is None or options.window >= padded  # the fused kernel skips no blocks out of a window
    fused = options.splash.fused_backward and causal and padded <= _FUSED_LENGTH
    blocks = _block_sizes(padded, padded, options.splash._replace(fused_backward=fused))
    attention = _kernel(np.arange(padded), heads, blocks, options, interpret=interpret)
    return _attended(attention, q, k, v, kernel.SegmentIds(segment_ids, segment_ids), sinks)[:, :length]


def _attended(
    attention: kernel.SplashAttentionKernel,
    q: Array,
    k: Array,
    v: Array,
    segments: kernel.SegmentIds,
    sinks: Array | None,
) -> Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks)
    assert isinstance(out, jax.Array)  # a tuple only if residuals are requested
    return out.swapaxes(1, 2)


def _kernel(
    order: np.ndarray,
    heads: int,
    blocks: kernel.BlockSizes,
    options: AttentionOptions,
    *,
    devices: int = 1,
    interpret: bool,
) -> kernel.SplashAttentionKernel:
    """The kernel for rows of tokens, of which `devices` compute the queries in `order`."""
    mask = _mask(len(order), options.window)
    mask.q_sequence = order.astype(np.int32)
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=devices,
        block_sizes=blocks,
        attn_logits_soft_cap=options.softcap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def _mask(length: int, window: int | None) -> masks.CausalMask | masks.LocalMask:
    if window is None or window >= length:
        return masks.CausalMask((length, length))
    return masks.LocalMask((length, length), (window - 1, 0), 0)


def _block_sizes(queries: int, keys: int, blocks: SplashBlocks) -> kernel.BlockSizes:
    """Blocks that divide so many queries, of which each device has a multiple, and keys."""
    block_q, block = _largest_block(queries, blocks.block_q), _largest_block(keys, blocks.block_kv)
    fused = blocks.fused_backward
    backward = _largest_block(keys, blocks.backward_block_kv) if fused else block
    return kernel.BlockSizes(
        block_q=block_q,
        block_kv=block,
        block_kv_compute=_largest_block(block, blocks.block_kv_compute),
        block_q_dkv=block_q,
        block_kv_dkv=backward,
        block_kv_dkv_compute=_largest_block(backward, blocks.block_kv_compute),
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def _largest_block(length: int, limit: int) -> int:
    """The largest multiple of `_LANES` up to `limit` that divides `length`."""
    return max(block for block in range(_LANES, min(length, limit) + 1, _LANES) if length % block == 0)
