"""Attention over packed rows or a cache: one function for several kernels. Callers never build a mask."""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Float

from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs, SplashBlocks, blockwise_attention
from jaxtrain.ops.context import PartKernel, attend_in_parts
from jaxtrain.ops.gpu.cudnn import cudnn_attention
from jaxtrain.ops.tpu.splash import splash_attention
from jaxtrain.parallel.mesh import platform_of
from jaxtrain.parallel.sharding import CONTEXT, context_shards
from jaxtrain.types import Array

Impl = Literal["auto", "xla", "splash", "cudnn"] | SplashBlocks
"""An implementation of attention; blocks mean splash attention with them."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    tokens: MaskInputs,
    options: AttentionOptions,
    *,
    sinks: Float[Array, " N"] | None = None,
    impl: Impl = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N V"]:
    """Grouped-query attention, causal by position and within a segment, softmax in float32.

    N is a multiple of K. V may differ from H: for the fused kernels the narrower of the two is padded with zeros.

    A query attends to the keys of its segment at its position and at most `options.window - 1`
    positions before it. Segment 0 is padding: its tokens attend to each other, so that their outputs are finite.

    Packed rows: `tokens` has nothing of the keys, which are those of the same tokens as the queries. The tokens of a
    segment must be adjacent and in the order of their positions; keys after a block of queries are skipped. With a
    cache, `kv_pos` and `kv_seg` are given. The output of a query that attends to no key is 0.

    With `tokens.prefix` a query also attends to the keys of the segment that its own continues, by their positions.
    Splash attention, which knows only equal segments and the places of a row, computes a row once for the first and
    once for the second of the segments that continue another one; it has no windows then. cuDNN's attention cannot.

    On a mesh with an axis `CONTEXT` the tokens of packed rows are sharded over it: see `ops.context`.

    `sinks` are the scores, one per head, of an additional key without a value that all queries of the head attend to
    (GPT-OSS).

    `impl="auto"` selects the kernel for the platform of `mesh`, or of JAX's default device without a mesh: splash
    attention on TPU for packed rows, else plain XLA. On a GPU, cuDNN's attention is selected where a run is declared
    (`roles.declare`), after a comparison with XLA. On other platforms than TPU splash attention is interpreted, for
    tests.

    Raises ValueError if shapes do not match or the kernel does not support an argument.
    """
    _check(q, k, v, tokens, options.window)
    packed = tokens.packed
    platform = platform_of(mesh)
    if impl == "auto":
        impl = "splash" if platform == "tpu" and packed else "xla"
    if isinstance(impl, SplashBlocks):
        impl, options = "splash", options._replace(splash=impl)
    if impl in ("splash", "cudnn") and not packed:
        raise ValueError(f"impl={impl!r} supports packed rows only: leave kv_pos and kv_seg out, or use 'xla'")
    if tokens.prefix is not None and (impl == "splash" or isinstance(impl, SplashBlocks)):
        return _one_continuation_at_a_time(q, k, v, tokens, options, sinks, impl, mesh)
    if tokens.prefix is not None and (impl == "cudnn" or context_shards(mesh) > 1):
        raise ValueError(f"impl={impl!r} on this mesh has no segments that continue others: see Model.shares_prefixes")
    if impl in ("splash", "cudnn") and v.shape[3] != q.shape[3]:
        width = max(v.shape[3], q.shape[3])
        wide_q, wide_k, wide_v = (jnp.pad(x, [*[(0, 0)] * 3, (0, width - x.shape[3])]) for x in (q, k, v))
        return attend(wide_q, wide_k, wide_v, tokens, options, sinks=sinks, impl=impl, mesh=mesh)[..., : v.shape[3]]
    if impl == "splash":
        interpret = platform != "tpu"
        return splash_attention(q, k, v, tokens.q_seg, options, sinks=sinks, mesh=mesh, interpret=interpret)
    if impl == "cudnn":
        if options.softcap is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(f"impl='cudnn' takes 16-bit floats (here {q.dtype}) and no softcap; use 'xla'")
        if platform != "gpu":
            raise ValueError(f"impl='cudnn' needs a GPU, not {platform}; use 'auto'")
        if context_shards(mesh) > 1:
            raise ValueError("impl='cudnn' takes whole rows: with mesh.context use 'xla', or mesh.context=1")

        def fallback(q: Array, k: Array, v: Array, seg: Array, sinks: Array | None) -> Array:
            index = jnp.broadcast_to(jnp.arange(seg.shape[1]), seg.shape)  # in packed rows, equivalent to positions
            return blockwise_attention(q, k, v, sinks, MaskInputs(index, seg), options)

        return cudnn_attention(q, k, v, tokens.q_seg, options, sinks=sinks, mesh=mesh, fallback=fallback)
    if packed and mesh is not None and context_shards(mesh) > 1:
        return _in_parts(q, k, v, tokens.q_seg, options, sinks, mesh)
    return blockwise_attention(q, k, v, sinks, tokens, options)


def _one_continuation_at_a_time(
    q: Array,
    k: Array,
    v: Array,
    tokens: MaskInputs,
    options: AttentionOptions,
    sinks: Array | None,
    impl: Impl,
    mesh: Mesh | None,
) -> Array:
    """Attention by equal segments and places alone: `Batch.prefix_ids` has at most two segments for each prefix."""
    assert tokens.prefix is not None
    if options.window is not None:
        raise ValueError(
            f"impl={impl!r} with a window counts the places of a row, between which another segment may be: use 'xla'"
        )
    number = jnp.where(tokens.prefix > 0, tokens.q_seg - tokens.prefix, 0)  # 1 and 2, in the order of the row
    first, second = (
        attend(
            *(q, k, v),
            MaskInputs(tokens.q_pos, jnp.where(number == each, tokens.prefix, tokens.q_seg)),
            options,
            sinks=sinks,
            impl=impl,
            mesh=mesh,
        )
        for each in (1, 2)
    )
    return jnp.where((number == 2)[..., None, None], second, first)


def _in_parts(
    q: Array, k: Array, v: Array, segment_ids: Array, options: AttentionOptions, sinks: Array | None, mesh: Mesh
) -> Array:
    """Plain XLA over rows whose tokens are sharded. It skips no masked keys, so any order of queries is balanced."""

    def part(_: None, q: Array, ids: Array, k: Array, v: Array, all_ids: Array, sinks: Array | None) -> Array:
        # In packed rows the places of tokens are equivalent to their positions.
        place = jnp.broadcast_to(jnp.arange(all_ids.shape[1]), all_ids.shape)
        own = lax.dynamic_slice_in_dim(place, lax.axis_index(CONTEXT) * ids.shape[1], ids.shape[1], 1)
        return blockwise_attention(q, k, v, sinks, MaskInputs(own, ids, place, all_ids), options)

    return attend_in_parts(PartKernel(part), q, k, v, segment_ids, sinks, mesh=mesh)


def _check(q: Array, k: Array, v: Array, tokens: MaskInputs, window: int | None) -> None:
    if q.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[::3] != q.shape[::3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attend: q {q.shape}, k {k.shape}, v {v.shape} are not [B, T, N, H], [B, S, K, H] and [B, S, K, V] with "
            "N % K == 0"
        )
    if (tokens.kv_pos is None) != (tokens.kv_seg is None):
        raise ValueError("attend: give both kv_pos and kv_seg (a cache) or neither (packed rows)")
    if tokens.packed and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attend: {k.shape[1]} keys for {q.shape[1]} queries of packed rows; a cache needs kv_pos, kv_seg"
        )
    if window is not None and window < 1:
        raise ValueError(f"attend: window={window} must be at least 1, the token itself")
