"""The gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.remat import DOWN, GATE, UP
from jaxtrain.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`. `at`: its path within a layer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None, at: str = "mlp"):
        def linear(name: str, inside: Axes, outside: Axes) -> Linear:
            return Linear(
                inside,
                outside,
                rngs=rngs,
                dtype=dtype,
                std=config.init_std,
                bias=config.mlp_bias,
                lora=lora if lora and lora.covers(f"{at}.{name}") else None,
            )

        stream, hidden = Axes((config.hidden_size,), ("embed",)), Axes((config.intermediate_size,), ("mlp",))
        self.activation = config.activation
        self.gate_proj = linear("gate_proj", stream, hidden)
        self.up_proj = linear("up_proj", stream, hidden)
        self.down_proj = linear("down_proj", hidden, stream)

    def __call__(self, x: Float[Array, "B T D"], keys: list[Array | None]) -> Float[Array, "B T D"]:
        """`keys` are dropout keys for the adapters of the three projections, or Nones."""
        gate, up = checkpoint_name(self.gate_proj(x, keys[0]), GATE), checkpoint_name(self.up_proj(x, keys[1]), UP)
        return checkpoint_name(self.down_proj(ACTIVATIONS[self.activation](gate) * up, keys[2]), DOWN)
