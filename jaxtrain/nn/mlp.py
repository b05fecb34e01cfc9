"""The gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Linear
from jaxtrain.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        def linear(name: str, inside: tuple[int, str], outside: tuple[int, str]) -> Linear:
            return Linear(
                *((inside[0],), (outside[0],), (inside[1],), (outside[1],)),
                rngs=rngs,
                dtype=dtype,
                std=config.init_std,
                bias=config.mlp_bias,
                lora=lora if lora and lora.covers(f"mlp.{name}") else None,
            )

        stream, hidden = (config.hidden_size, "embed"), (config.intermediate_size, "mlp")
        self.activation = config.activation
        self.gate_proj = linear("gate_proj", stream, hidden)
        self.up_proj = linear("up_proj", stream, hidden)
        self.down_proj = linear("down_proj", hidden, stream)

    def __call__(self, x: Array, keys: list[Array | None]) -> Array:
        """x [B, T, D] -> [B, T, D]; `keys` are three dropout keys for the adapters, or Nones."""
        gate = ACTIVATIONS[self.activation](self.gate_proj(x, keys[0]))
        return self.down_proj(gate * self.up_proj(x, keys[1]), keys[2])
