"""`Linear`: a matrix product over one or several axes, with an optional bias and low-rank adapter."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from jaxtrain.nn.config import Lora
from jaxtrain.ops.project import project
from jaxtrain.ops.quantize import Quantized, project_quantized
from jaxtrain.types import Array


class Axes(NamedTuple):
    """Sizes and logical names of the axes on one side of a kernel."""

    sizes: tuple[int, ...]
    names: tuple[str, ...]


class Linear(nnx.Module):
    """`y[..., *out] = x[..., *in] @ kernel[*in, *out] + bias[*out] + scale * (x @ lora_a) @ lora_b`.

    Axes carry logical names; a table of rules maps these to mesh axes (`parallel.sharding`).
    """

    def __init__(
        self,
        inside: Axes,
        outside: Axes,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        std: float,
        bias: bool = False,
        lora: Lora | None = None,
    ):
        self.in_rank = len(inside.sizes)
        kernel = nnx.initializers.normal(std)(rngs.params(), (*inside.sizes, *outside.sizes), dtype)
        self.kernel = nnx.Param(kernel, out_sharding=(*inside.names, *outside.names))
        # A bias along the residual stream is replicated, like norms: gathering it would cost more than it saves.
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in outside.names)
        self.bias = nnx.Param(jnp.zeros(outside.sizes, dtype), out_sharding=bias_axes) if bias else nnx.data(None)
        self.lora_a = self.lora_b = nnx.data(None)
        self.lora = lora
        if lora:
            # As in PEFT: a is uniform within 1/sqrt(fan in) and b is zero, so that the initial model is the base.
            bound = 1 / math.sqrt(math.prod(inside.sizes))
            a = jax.random.uniform(rngs.params(), (*inside.sizes, lora.rank), lora.dtype, -bound, bound)
            self.lora_a = nnx.Param(a, out_sharding=(*inside.names, "rank"))
            b = jnp.zeros((lora.rank, *outside.sizes), lora.dtype)
            self.lora_b = nnx.Param(b, out_sharding=("rank", *outside.names))

    def __call__(self, x: Float[Array, "..."], dropout_key: Array | None = None) -> Float[Array, "..."]:
        """x [..., *in] -> [..., *out] in x's dtype. `dropout_key` turns on the dropout of the adapter."""
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
