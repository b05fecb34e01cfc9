"""RMS norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtrain.nn.config import ModelConfig
from jaxtrain.types import Array


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axes, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str | None, ...], *, dtype: jnp.dtype):
        self.eps, self.offset, self.wide = config.norm_eps, config.norm_offset, config.norm_in_float32
        self.over = tuple(range(-len(shape), 0))
        # With an offset the parameter is the difference of the scale from 1.
        self.scale = nnx.Param((jnp.zeros if self.offset else jnp.ones)(shape, dtype), out_sharding=axes)

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """x [..., *shape], normalised over its last axes, in its dtype."""
        normed = _normalised(x, self.over, self.eps).astype(jnp.float32 if self.wide else x.dtype)
        scale = self.scale[...].astype(normed.dtype)
        return ((1 + scale if self.offset else scale) * normed).astype(x.dtype)


def rms_norm(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """The norm over the last axis without a scale, in x's dtype."""
    return _normalised(x, (-1,), eps).astype(x.dtype)


def _normalised(x: Array, over: tuple[int, ...], eps: float) -> Array:
    """In float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, over, keepdims=True) + eps)
