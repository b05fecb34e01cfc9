"""Grouped-query attention: projections, norms of queries and keys, rope, cache and `ops.attend`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.nn.cache import LayerCache, order_on
from jaxtrain.nn.config import LayerKind, Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.remat import ATTENTION_OUT, QKV
from jaxtrain.nn.rope import RopeTable, apply_rope
from jaxtrain.ops.attend import Impl, attend
from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs
from jaxtrain.types import Array


class AttentionInputs(NamedTuple):
    """Inputs that all layers of a forward pass share."""

    positions: Array  # [B, T]
    segment_ids: Array  # [B, T]
    ropes: tuple[RopeTable | None, ...]  # one per kind of layer
    cached: Array | None = None  # [B] tokens in the cache before this call; None: there is no cache
    length: Array | None = None  # [B] tokens in the cache after this call
    prefix_ids: Array | None = None  # [B, T] of packed rows


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        stream = Axes((config.hidden_size,), ("embed",))
        heads = Axes((config.num_heads, config.head_dim), ("heads", "head_dim"))
        kv_heads = Axes((config.num_kv_heads, config.head_dim), ("kv_heads", "head_dim"))

        def linear(name: str, inside: Axes, outside: Axes, bias: bool) -> Linear:
            return Linear(
                inside,
                outside,
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
        self.gate_proj = (
            linear("gate_proj", stream, heads, config.qkv_bias) if config.attention_gate else nnx.data(None)
        )
        self.q_norm = self.k_norm = nnx.data(None)
        if config.qk_norm:
            # Over each head with scales [H], or over all heads with scales [N, H].
            parts = slice(1, None) if config.qk_norm == "head" else slice(None)
            norm_class = module_class(config, "norm", RMSNorm)
            self.q_norm = norm_class(config, heads.sizes[parts], heads.names[parts], dtype=dtype)
            self.k_norm = norm_class(config, kv_heads.sizes[parts], kv_heads.names[parts], dtype=dtype)
        self.sinks = nnx.data(None)
        if config.sinks:
            sinks = nnx.initializers.normal(config.init_std)(rngs.params(), (config.num_heads,), dtype)
            self.sinks = nnx.Param(sinks, out_sharding=("heads",))
        self.scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
        self.softcap = config.attention_softcap

    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: AttentionInputs,
        kinds: tuple[LayerKind, ...],
        kind: Array | int,
        cache: LayerCache | None,
        keys: list[Array | None],
        impl: Impl,
        mesh: jax.sharding.Mesh | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The output, and the cache with this call's keys and values in it; without a cache, these keys and values.

        `kinds[kind]` has the window and the rope of this layer; `kind` may be traced, since stacked layers share one
        body. `keys` are dropout keys for the adapters of the four projections, or Nones.
        """
        q, k, v = self.q_proj(x, keys[0]), self.k_proj(x, keys[1]), self.v_proj(x, keys[2])
        q, k, v = (checkpoint_name(each, QKV) for each in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)

        def branch(each: LayerKind, rope: RopeTable | None) -> Callable[..., tuple[Array, LayerCache]]:
            """Rope, cache and attention of a layer of one kind."""
            options = AttentionOptions(self.scale, each.window, self.softcap)

            def run(q: Array, k: Array, v: Array) -> tuple[Array, LayerCache]:
                q, k = apply_rope(q, rope), apply_rope(k, rope)
                tokens = MaskInputs(inputs.positions, inputs.segment_ids, prefix=inputs.prefix_ids)
                if cache is None:
                    out = attend(q, k, v, tokens, options, sinks=sinks, impl=impl, mesh=mesh)
                    return out, LayerCache.of(k, v, order_on(mesh))
                written, k, v, kv_pos, kv_seg = with_cached(cache, k, v, inputs)
                tokens = tokens._replace(kv_pos=kv_pos, kv_seg=kv_seg)
                # The fused kernels take packed rows only.
                return attend(q, k, v, tokens, options, sinks=sinks, impl="xla", mesh=mesh), written

            return run

        branches = [branch(each, rope) for each, rope in zip(kinds, inputs.ropes, strict=True)]
        out, written = branches[kind](q, k, v) if isinstance(kind, int) else jax.lax.switch(kind, branches, q, k, v)
        if self.gate_proj is not None:
            key = None if keys[0] is None else jax.random.fold_in(keys[0], 1)
            out *= jax.nn.sigmoid(checkpoint_name(self.gate_proj(x, key), QKV))
        return checkpoint_name(self.o_proj(out, keys[3]), ATTENTION_OUT), written


def with_cached(
    cache: LayerCache, k: Array, v: Array, inputs: AttentionInputs
) -> tuple[LayerCache, Array, Array, Array, Array]:
    """The cache with k, v [B, T, K, H] written to it, and the keys, values [B, S, K, H], positions and segments [B, S]
    that the queries attend to.

    All tokens of a row of a cache are in segment 1. A single token overwrites a column that its window no longer
    reaches, so it is written first and attends to the buffer itself. Several tokens attend to the buffer as it was
    before the call and to each other.
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
