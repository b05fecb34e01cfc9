"""RMS norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.types import Array


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, axis: str, *, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype), out_sharding=(axis,))

    def __call__(self, x: Array) -> Array:
        """x [..., size] -> [..., size] in x's dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * normed.astype(x.dtype)
