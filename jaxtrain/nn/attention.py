"""Grouped-query attention: projections, norms of queries and keys, rope, cache and `ops.attend`."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.nn.cache import LayerCache, LayerState, NoState, order_on
from jaxtrain.nn.config import LayerKind, Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm, rms_norm
from jaxtrain.nn.remat import ATTENTION_OUT, QKV
from jaxtrain.nn.rope import RopeTable, apply_rope
from jaxtrain.ops.attend import Impl, attend
from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs
from jaxtrain.types import Array


class KeysValues(NamedTuple):
    """What the queries of a layer attend to, for the layers that reuse it."""

    k: Array  # [B, S, K, H] after rope
    v: Array  # [B, S, K, H]
    positions: Array | None  # [B, S]; None: those of the queries
    segment_ids: Array | None  # [B, S]


class AttentionInputs(NamedTuple):
    """Inputs that all layers of a forward pass share, and in a layer those of this layer."""

    positions: Array  # [B, T]
    segment_ids: Array  # [B, T]
    ropes: tuple[RopeTable | None, ...]  # one per kind of layer
    cached: Array | None = None  # [B] tokens in the cache before this call; None: there is no cache
    length: Array | None = None  # [B] tokens in the cache after this call
    prefix_ids: Array | None = None  # [B, T] of packed rows
    of_layer: Array | None = None  # [B, T, P] the layer's input beside the residual stream: see `nn.per_layer`
    reused: dict[str, KeysValues] | None = None  # of the last layers before this one, if later ones reuse them


def inputs_of(
    kind: Array | int, kinds: tuple[LayerKind, ...], inputs: AttentionInputs, part: str
) -> tuple[Array | int, tuple[LayerKind, ...], AttentionInputs]:
    """The arguments of the attention at `part` of a block: of all kinds of layers only those that have this part."""
    own = [number for number, each in enumerate(kinds) if each.mixer_part == part]
    if len(own) == len(kinds):
        return kind, kinds, inputs
    place = [own.index(number) if number in own else 0 for number in range(len(kinds))]
    kind = 0 if len(own) == 1 else place[kind] if isinstance(kind, int) else jnp.asarray(place)[kind]
    ropes = tuple(inputs.ropes[number] for number in own)
    return kind, tuple(kinds[number] for number in own), inputs._replace(ropes=ropes)


_PLAIN = LayerKind(None, None)


class Attention(nnx.Module):
    """Grouped-query attention (https://arxiv.org/abs/2305.13245). `kind`: that of its layers, which has its sizes."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        lora: Lora | None,
        kind: LayerKind = _PLAIN,
    ):
        kv_count, width = config.heads_of(kind)
        stream = Axes((config.hidden_size,), ("embed",))
        heads = Axes((config.num_heads, width), ("heads", "head_dim"))
        kv_heads = Axes((kv_count, width), ("kv_heads", "head_dim"))
        self.mixer = kind.mixer
        sizes = config.global_attention if kind.mixer == "global" else None
        only_keys = sizes is not None and sizes.values_are_keys

        def linear(name: str, inside: Axes, outside: Axes, bias: bool) -> Linear:
            return Linear(
                inside,
                outside,
                rngs=rngs,
                dtype=dtype,
                std=config.init_std,
                bias=bias,
                lora=lora if lora and lora.covers(f"{kind.mixer_part}.{name}") else None,
            )

        self.q_proj = linear("q_proj", stream, heads, config.qkv_bias)
        self.k_proj = self.v_proj = nnx.data(None)
        if not kind.reuses:
            self.k_proj = linear("k_proj", stream, kv_heads, config.qkv_bias)
        if not (kind.reuses or only_keys):
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
            if not kind.reuses:
                self.k_norm = norm_class(config, kv_heads.sizes[parts], kv_heads.names[parts], dtype=dtype)
        self.v_norm_eps = config.norm_eps if config.v_norm else None
        self.sinks = nnx.data(None)
        if config.sinks:
            sinks = nnx.initializers.normal(config.init_std)(rngs.params(), (config.num_heads,), dtype)
            self.sinks = nnx.Param(sinks, out_sharding=("heads",))
        self.scale = config.attention_scale or 1 / math.sqrt(width)
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
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """The output, and the cache with this call's keys and values in it; without a cache, these keys and values.

        `kinds[kind]` has the window and the rope of this layer; `kind` may be traced, since stacked layers share one
        body. `keys` are dropout keys for the adapters of the four projections, or Nones.
        """
        return self._attend(x, inputs, kinds, kind, cache, keys, impl, mesh)[:2]

    def _projected(self, x: Array, keys: list[Array | None]) -> tuple[Array, ...]:
        """Queries, keys and values before rope; queries alone if keys and values are those of another layer."""
        q = checkpoint_name(self.q_proj(x, keys[0]), QKV)
        if self.k_proj is None:
            return (q if self.q_norm is None else self.q_norm(q),)
        k = v = checkpoint_name(self.k_proj(x, keys[1]), QKV)
        if self.v_proj is not None:
            v = checkpoint_name(self.v_proj(x, keys[2]), QKV)
        q, k = (x if norm is None else norm(x) for x, norm in ((q, self.q_norm), (k, self.k_norm)))
        return q, k, v if self.v_norm_eps is None else rms_norm(v, self.v_norm_eps)

    def _attend(
        self,
        x: Array,
        inputs: AttentionInputs,
        kinds: tuple[LayerKind, ...],
        kind: Array | int,
        cache: LayerState | None,
        keys: list[Array | None],
        impl: Impl,
        mesh: jax.sharding.Mesh | None,
    ) -> tuple[Array, LayerState, KeysValues]:
        """See `__call__`; with the keys and values that the layers which reuse them attend to."""
        projected = self._projected(x, keys)
        sinks = None if self.sinks is None else self.sinks[...].astype(jnp.float32)

        def branch(each: LayerKind, rope: RopeTable | None) -> Callable[..., tuple[Array, LayerState, KeysValues]]:
            """Rope, cache and attention of a layer of one kind."""
            options = AttentionOptions(self.scale, each.window, self.softcap)

            def own(k: Array, v: Array) -> tuple[LayerState, KeysValues]:
                k = apply_rope(k, rope)
                if cache is None:
                    return LayerCache.of(k, v, order_on(mesh)), KeysValues(k, v, None, None)
                assert isinstance(cache, LayerCache)
                written, *seen = with_cached(cache, k, v, inputs)
                return written, KeysValues(*seen)

            def run(q: Array, *kv: Array) -> tuple[Array, LayerState, KeysValues]:
                if kv:
                    written, seen = own(*kv)
                else:
                    assert inputs.reused is not None
                    written, seen = NoState(), inputs.reused[self.mixer]
                tokens = MaskInputs(inputs.positions, inputs.segment_ids, prefix=inputs.prefix_ids)
                tokens = tokens._replace(kv_pos=seen.positions, kv_seg=seen.segment_ids)
                # The fused kernels take packed rows only.
                by = impl if seen.positions is None else "xla"
                q = apply_rope(q, rope)
                return attend(q, seen.k, seen.v, tokens, options, sinks=sinks, impl=by, mesh=mesh), written, seen

            return run

        branches = [branch(each, rope) for each, rope in zip(kinds, inputs.ropes, strict=True)]
        choose = branches[kind] if isinstance(kind, int) else partial(jax.lax.switch, kind, branches)
        out, written, seen = choose(*projected)
        if self.gate_proj is not None:
            key = None if keys[0] is None else jax.random.fold_in(keys[0], 1)
            out *= jax.nn.sigmoid(checkpoint_name(self.gate_proj(x, key), QKV))
        return checkpoint_name(self.o_proj(out, keys[3]), ATTENTION_OUT), written, seen


class SharedAttention(Attention):
    """Attention in a model some of whose layers reuse the keys and values of others."""

    def __call__(self, *args: Any) -> Any:
        """As that of `Attention`; also what the queries attend to."""
        return self._attend(*args)


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
