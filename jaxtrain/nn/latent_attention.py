"""Multi-head latent attention (https://arxiv.org/abs/2405.04434, section 2.1): keys and values of all heads from one
vector of a token."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.nn.attention import AttentionInputs, with_cached
from jaxtrain.nn.cache import LayerCache, order_on
from jaxtrain.nn.config import LayerKind, Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.remat import ATTENTION_OUT, QKV
from jaxtrain.nn.rope import RopeTable, apply_rope
from jaxtrain.ops.attend import Impl, attend
from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs
from jaxtrain.ops.quantize import Quantized
from jaxtrain.types import Array


class LatentAttention(nnx.Module):
    """A token has a latent vector [R], from which the keys [N, P] and values [N, V] of all heads are projected, and one
    rotated key [Q] that all heads share: scores are those of the two parts of queries [N, P + Q] with both.

    Packed rows expand the latent vectors to keys and values. The cache holds the vectors themselves, [R + Q] numbers
    for a token; queries are projected into their space instead, and outputs out of it, which gives the same result up
    to rounding.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.latent is not None
        self.sizes = sizes = config.latent
        stream = Axes((config.hidden_size,), ("embed",))
        queries = Axes((config.num_heads, config.head_dim), ("heads", "head_dim"))
        keys = Axes((config.num_heads, sizes.plain_width), ("heads", "head_dim"))
        values = Axes((config.num_heads, sizes.value_width), ("heads", "head_dim"))

        def linear(name: str, inside: Axes, outside: Axes, bias: bool = False) -> Linear:
            adapter = lora if lora and lora.covers(f"attn.{name}") else None
            return Linear(inside, outside, rngs=rngs, dtype=dtype, std=config.init_std, bias=bias, lora=adapter)

        def norm(width: int) -> RMSNorm:
            norm_class = module_class(config, "norm", RMSNorm)
            return norm_class(replace(config, norm_eps=sizes.norm_eps), (width,), ("norm",), dtype=dtype)

        self.q_proj = self.q_down = self.q_norm = self.q_up = nnx.data(None)
        if sizes.query_rank is None:
            self.q_proj = linear("q_proj", stream, queries)
        else:
            self.q_down = linear("q_down", stream, Axes((sizes.query_rank,), ("head_dim",)), config.qkv_bias)
            self.q_norm = norm(sizes.query_rank)
            self.q_up = linear("q_up", Axes((sizes.query_rank,), ("latent",)), queries)
        self.kv_down = linear("kv_down", stream, Axes((sizes.rank,), ("head_dim",)), config.qkv_bias)
        self.kv_norm = norm(sizes.rank)
        self.k_rope = linear("k_rope", stream, Axes((sizes.rope_width,), ("head_dim",)), config.qkv_bias)
        latent = Axes((sizes.rank,), ("latent",))
        self.k_up, self.v_up = linear("k_up", latent, keys), linear("v_up", latent, values)
        self.o_proj = linear("o_proj", values, stream, config.o_bias)
        self.scale = config.attention_scale or 1 / math.sqrt(config.head_dim)

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
        """The output, and the cache with this call's latent vectors in it; without a cache, these vectors.

        Arguments are those of `nn.attention.Attention`; the first of `keys` turns on the dropout of all adapters.
        """
        drop = [None] * 7 if keys[0] is None else list(jax.random.split(keys[0], 7))
        if self.q_proj is not None:
            q = self.q_proj(x, drop[0])
        else:
            assert self.q_down is not None and self.q_norm is not None and self.q_up is not None
            q = self.q_up(self.q_norm(self.q_down(x, drop[0])), drop[1])
        latent, shared = self.kv_norm(self.kv_down(x, drop[2])), self.k_rope(x, drop[3])
        q, latent, shared = (checkpoint_name(each, QKV) for each in (q, latent, shared))
        tokens = MaskInputs(inputs.positions, inputs.segment_ids, prefix=inputs.prefix_ids)

        def expanded(options: AttentionOptions, plain: Array, turned: Array, held: Array) -> tuple[Array, LayerCache]:
            latent, shared = jnp.split(held, [self.sizes.rank], -1)
            k = self.k_up(latent[..., 0, :], drop[4])
            k = jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:3], shared.shape[-1]))], -1)
            v, q = self.v_up(latent[..., 0, :], drop[5]), jnp.concatenate([plain, turned], -1)
            out = attend(q, k, v, tokens, options, impl=impl, mesh=mesh)
            return out, LayerCache.of(held, held[..., :0], order_on(mesh))

        def absorbed(options: AttentionOptions, plain: Array, turned: Array, held: Array) -> tuple[Array, LayerCache]:
            assert cache is not None
            q = jnp.concatenate([jnp.einsum("btnp,rnp->btnr", plain, _kernel(self.k_up, q_dtype)), turned], -1)
            written, k, _, kv_pos, kv_seg = with_cached(cache, held, held[..., :0], inputs)
            seen = tokens._replace(kv_pos=kv_pos, kv_seg=kv_seg)
            # The values are the vectors without their last channels: a slice of the cache would be a copy of it.
            out = attend(q, k, k, seen, options, impl="xla", mesh=mesh)[..., : self.sizes.rank]
            return jnp.einsum("btnr,rnv->btnv", out, _kernel(self.v_up, q_dtype)), written

        q_dtype = q.dtype
        compute = expanded if cache is None else absorbed

        def branch(each: LayerKind, rope: RopeTable | None) -> Callable[..., tuple[Array, LayerCache]]:
            """Rope, cache and attention of a layer of one kind."""
            factor = 1.0 if each.rope is None else each.rope.score_factor
            options = AttentionOptions(self.scale * factor, each.window)

            def run(q: Array, latent: Array, shared: Array) -> tuple[Array, LayerCache]:
                plain, turned = jnp.split(q, [self.sizes.plain_width], -1)
                turned, shared = apply_rope(turned, rope), apply_rope(shared[..., None, :], rope)
                return compute(options, plain, turned, jnp.concatenate([latent[..., None, :], shared], -1))

            return run

        branches = [branch(each, rope) for each, rope in zip(kinds, inputs.ropes, strict=True)]
        choose = branches[kind] if isinstance(kind, int) else partial(jax.lax.switch, kind, branches)
        out, written = choose(q, latent, shared)
        return checkpoint_name(self.o_proj(out, drop[6]), ATTENTION_OUT), written


def _kernel(linear: Linear, dtype: jnp.dtype) -> Array:
    """The kernel [R, N, *] of a linear without a bias, with its adapter in it."""
    if linear.lora is None and not isinstance(linear.kernel.get_value(), Quantized):
        return linear.kernel[...].astype(dtype)
    return linear(jnp.eye(linear.kernel.shape[0], dtype=dtype))
