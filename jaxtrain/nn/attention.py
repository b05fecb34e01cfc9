"""Grouped-query attention: projections, head norms and rope around the one `attend`."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.nn.cache import LayerCache, order_on
from jaxtrain.nn.config import LayerKind, Lora, ModelConfig
from jaxtrain.nn.linear import Linear
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.rope import RopeTable, apply_rope
from jaxtrain.ops.attend import Impl, attend
from jaxtrain.types import Array


class AttentionInputs(NamedTuple):
    """What every layer of one forward pass shares."""

    positions: Array  # [B, T]
    segment_ids: Array  # [B, T]
    ropes: tuple[RopeTable | None, ...]  # one per kind of layer
    cached: Array | None = None  # [B] tokens that the cache holds before this call; None: there is no cache
    length: Array | None = None  # [B] tokens that it holds after it


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        stream = ((config.hidden_size,), ("embed",))
        heads = ((config.num_heads, config.head_dim), ("heads", "head_dim"))
        kv_heads = ((config.num_kv_heads, config.head_dim), ("kv_heads", "head_dim"))

        def linear(name: str, inside: tuple, outside: tuple, bias: bool) -> Linear:
            return Linear(
                *(inside[0], outside[0], inside[1], outside[1]),
                rngs=rngs,
                dtype=dtype,
                std=config.init_std,
                bias=bias,
                lora=lora if lora and lora.covers(f"attn.{name}") else None,
            )

        self.q_proj = linear("q_proj", stream, heads, config.qkv_bias)
        self.k_proj = linear("k_proj", stream, kv_heads, config.qkv_bias)
        self.v_proj = linear("v_proj", stream, kv_heads, config.qkv_bias)
        self.o_proj = linear("o_proj", heads, stream, config.o_bias)
        self.q_norm = self.k_norm = nnx.data(None)
        if config.qk_norm:
            # Over each head with one scale, or over all heads with a scale of every channel.
            parts = slice(1, None) if config.qk_norm == "head" else slice(None)
            norm_class = module_class(config, "norm", RMSNorm)
            self.q_norm = norm_class(config, heads[0][parts], heads[1][parts], dtype=dtype)
            self.k_norm = norm_class(config, kv_heads[0][parts], kv_heads[1][parts], dtype=dtype)
        self.sinks = nnx.data(None)
        if config.sinks:
            sinks = nnx.initializers.normal(config.init_std)(rngs.params(), (config.num_heads,), dtype)
            self.sinks = nnx.Param(sinks, out_sharding=("heads",))
        self.scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
        self.softcap = config.attention_softcap

    def __call__(
        self,
        x: Array,
        inputs: AttentionInputs,
        kinds: tuple[LayerKind, ...],
        kind: Array | int,
        cache: LayerCache | None,
        keys: list[Array | None],
        impl: Impl,
        mesh: jax.sharding.Mesh | None,
    ) -> tuple[Array, LayerCache]:
        """x [B, T, D] -> [B, T, D] and the cache with this call's keys and values in it, or those alone.

        `kinds[kind]` says how far this layer looks and how it turns; `kind` may be traced, since stacked layers share
        one body.
        """
        q, k, v = self.q_proj(x, keys[0]), self.k_proj(x, keys[1]), self.v_proj(x, keys[2])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        branches = [
            partial(self._look, inputs, each.window, rope, cache, impl, mesh)
            for each, rope in zip(kinds, inputs.ropes, strict=True)
        ]
        out, written = branches[kind](q, k, v) if isinstance(kind, int) else jax.lax.switch(kind, branches, q, k, v)
        return self.o_proj(out, keys[3]), written

    def _look(
        self,
        inputs: AttentionInputs,
        window: int | None,
        rope: RopeTable | None,
        cache: LayerCache | None,
        impl: Impl,
        mesh: jax.sharding.Mesh | None,
        q: Array,
        k: Array,
        v: Array,
    ) -> tuple[Array, LayerCache]:
        """What a layer of one kind does with its q [B, T, N, H] and its k and v [B, T, K, H]: -> [B, T, N, H]."""
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        kv_pos = kv_seg = None
        if cache is None:
            cache = LayerCache.of(k, v, order_on(mesh))
        else:
            impl = "xla"  # the kernels are made for whole rows; a few queries over a cache need none
            cache, k, v, kv_pos, kv_seg = _with_cached(cache, k, v, inputs)
        out = attend(
            q,
            k,
            v,
            q_pos=inputs.positions,
            kv_pos=kv_pos,
            q_seg=inputs.segment_ids,
            kv_seg=kv_seg,
            window=window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            impl=impl,
            mesh=mesh,
        )
        return out, cache


def _with_cached(
    cache: LayerCache, k: Array, v: Array, inputs: AttentionInputs
) -> tuple[LayerCache, Array, Array, Array, Array]:
    """The cache with k, v [B, T, K, H] in it, and all keys, values [B, S, K, H], positions, segments [B, S] to look at.

    Rows of a cache are one segment, 1. A single token takes the column of one that is out of its sight by then, so it
    is written first and looks at the buffer itself; several tokens look at what was there before and at each other.
    """
    assert inputs.cached is not None and inputs.length is not None
    written = cache.write(k, v, inputs.positions, inputs.segment_ids, inputs.length)
    if k.shape[1] == 1:
        kv_pos = written.positions(inputs.length)
        return written, *written.all(), kv_pos, _segments(kv_pos)
    kv_pos = cache.positions(inputs.cached)
    k, v = (jnp.concatenate(both, 1) for both in zip(cache.all(), (k, v), strict=True))
    kv_seg = jnp.concatenate([_segments(kv_pos), inputs.segment_ids], 1)
    return written, k, v, jnp.concatenate([kv_pos, inputs.positions], 1), kv_seg


def _segments(kv_pos: Array) -> Array:
    return jnp.where(kv_pos >= 0, 1, -1)
