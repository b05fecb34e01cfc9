"""`Linear`: a matrix over one or several axes, with its bias and its low-rank adapter."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.nn.config import Lora
from jaxtrain.ops.project import project
from jaxtrain.ops.quantize import Quantized, project_quantized
from jaxtrain.types import Array


class Linear(nnx.Module):
    """`y[..., *out] = x[..., *in] @ kernel[*in, *out] + bias[*out] + scale * (x @ lora_a) @ lora_b`.

    Axes carry logical names, so that a rule table and nothing else decides how a parameter lies on a mesh.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        in_axes: tuple[str, ...],
        out_axes: tuple[str, ...],
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        std: float,
        bias: bool = False,
        lora: Lora | None = None,
    ):
        self.in_rank = len(in_shape)
        normal = nnx.initializers.normal(std)
        self.kernel = nnx.Param(
            normal(rngs.params(), (*in_shape, *out_shape), dtype), out_sharding=(*in_axes, *out_axes)
        )
        # A bias along the residual stream is replicated like a norm: it is too small to be worth a gather.
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in out_axes)
        self.bias = nnx.Param(jnp.zeros(out_shape, dtype), out_sharding=bias_axes) if bias else nnx.data(None)
        self.lora_a = self.lora_b = nnx.data(None)
        self.lora = lora
        if lora:
            # PEFT's initialisation: a uniform within 1/sqrt(fan in), b zero, so that step 0 is the base model.
            bound = 1 / math.sqrt(math.prod(in_shape))
            a = jax.random.uniform(rngs.params(), (*in_shape, lora.rank), lora.dtype, -bound, bound)
            self.lora_a = nnx.Param(a, out_sharding=(*in_axes, "rank"))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, *out_shape), lora.dtype), out_sharding=("rank", *out_axes))

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        """x [..., *in] -> [..., *out] in x's dtype. `dropout_key` switches the adapter's dropout on."""
        y = self._contract(x, self.kernel, self.in_rank)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        if self.lora is not None:
            if dropout_key is not None and self.lora.dropout:
                keep = jax.random.bernoulli(dropout_key, 1 - self.lora.dropout, x.shape)
                x = jnp.where(keep, x / (1 - self.lora.dropout), 0).astype(x.dtype)
            y += self.lora.scale * self._contract(self._contract(x, self.lora_a, self.in_rank), self.lora_b, 1)
        return y

    @staticmethod
    def _contract(x: Array, kernel: nnx.Param | None, rank: int) -> Array:
        assert kernel is not None
        weight = kernel.get_value()
        if isinstance(weight, Quantized):
            return project_quantized(x, weight, rank)
        return project(x, weight.astype(x.dtype), rank)
