"""Splash attention (JAX's Pallas kernel for TPU) over packed rows, sharded over a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Integer

from jaxtrain.ops.blockwise import RESIDUALS, AttentionOptions
from jaxtrain.parallel.sharding import ROWS
from jaxtrain.types import Array

_LANES = 128  # lanes of a vector register: blocks are multiples of it

# The largest number of tokens of a block. Larger blocks reduce the kernel's overhead per block. MaxText's published v5p
# and v6e configurations use 512 to 2048; these are the largest that fit the vector memory of v5e, v5p and v6e.
_BLOCK = 1024
_BLOCK_COMPUTE = 512


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
    """Attention within packed rows; see `attend`. Each device computes its rows and its heads."""
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
    # The causal mask hides padding after the last token from all tokens, in any segment.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * options.scale, k, v))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    attention = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([_mask(length + padding, options.window)] * heads),
        block_sizes=_block_sizes(length + padding),
        attn_logits_soft_cap=options.softcap,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
    segments = kernel.SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, sinks)
    assert isinstance(out, jax.Array)  # a tuple only if residuals are requested
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
    """The largest multiple of `_LANES` up to `limit` that divides `length`."""
    return max(block for block in range(_LANES, min(length, limit) + 1, _LANES) if length % block == 0)
