"""Decoder modules that tests use by import path."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.nn.attention import Attention
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.norm import RMSNorm


class TemperedAttention(Attention):
    """Attention with scores of twice the usual scale."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.scale *= 2


class PlainMLP(nnx.Module):
    """Two matrices without a gate."""

    def __init__(self, config, *, rngs, dtype, lora):
        sides = Axes((config.hidden_size,), ("embed",)), Axes((config.intermediate_size,), ("mlp",))
        options = {"rngs": rngs, "dtype": dtype, "std": config.init_std}
        self.up_proj = Linear(*sides, **options)
        self.down_proj = Linear(*sides[::-1], **options)

    def __call__(self, x, keys):
        return self.down_proj(jax.nn.gelu(self.up_proj(x, keys[0])), keys[1])


class LayerNorm(nnx.Module):
    """Mean and variance, with a scale and a shift."""

    def __init__(self, config, shape, axes, *, dtype):
        self.over = tuple(range(-len(shape), 0))
        self.scale = nnx.Param(jnp.ones(shape, dtype), out_sharding=axes)
        self.shift = nnx.Param(jnp.zeros(shape, dtype), out_sharding=axes)

    def __call__(self, x):
        centred = x - x.mean(self.over, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred**2).mean(self.over, keepdims=True) + 1e-6)
        return normed * self.scale[...].astype(x.dtype) + self.shift[...].astype(x.dtype)


class SameNorm(RMSNorm):
    """The default under another name."""

    matches_default = True


def not_a_class(config, **kwargs):
    return None
