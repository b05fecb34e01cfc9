"""Inputs of single layers beside the residual stream, made of the tokens (Gemma 3n, Gemma 4).

Every layer has a small embedding of each token. With a projection of the token's embedding it is the input of the
layer, which multiplies a gate and is added to the residual stream at the end of the layer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Integer

from jaxtrain.nn.config import Lora, ModelConfig
from jaxtrain.nn.linear import Axes, Linear
from jaxtrain.nn.mlp import ACTIVATIONS
from jaxtrain.nn.modules import module_class
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.types import Array


class PerLayerInputs(nnx.Module):
    """The inputs of all layers: `(norm(projection(x) / sqrt(D)) + sqrt(P) embedding(token)) / sqrt(2)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        assert config.per_layer_width is not None
        width = config.per_layer_width
        shape = (config.padded_vocab, config.num_layers, width)
        weight = nnx.initializers.normal(config.init_std)(rngs.params(), shape)
        real = jnp.arange(config.padded_vocab)[:, None, None] < config.vocab_size
        self.weight = nnx.Param(jnp.where(real, weight, 0).astype(dtype), out_sharding=("vocab", "norm", "embed"))
        self.proj = Linear(
            Axes((config.hidden_size,), ("embed",)),
            Axes(shape[1:], ("norm", "norm")),
            rngs=rngs,
            dtype=dtype,
            std=config.init_std,
        )
        norm_class = module_class(config, "norm", RMSNorm)
        self.norm = norm_class(config, (width,), ("norm",), dtype=dtype)
        self.scale = 1 / math.sqrt(config.hidden_size)
        self.embedding_scale = math.sqrt(width)

    def __call__(self, x: Float[Array, "B T D"], tokens: Integer[Array, "B T"]) -> Float[Array, "L B T P"]:
        """`x`: the embedding of `tokens`, as the first layer gets it."""
        looked_up = self.weight[...][tokens].astype(x.dtype) * jnp.asarray(self.embedding_scale, x.dtype)
        projected = self.norm(self.proj(x) * jnp.asarray(self.scale, x.dtype))
        return jnp.moveaxis((projected + looked_up) * jnp.asarray(2**-0.5, x.dtype), 2, 0)


class PerLayerGate(nnx.Module):
    """What a layer makes of its input: `norm(out(act(gate(x)) * input))`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, lora: Lora | None):
        assert config.per_layer_width is not None
        stream, inner = Axes((config.hidden_size,), ("embed",)), Axes((config.per_layer_width,), ("mlp",))

        def linear(name: str, inside: Axes, outside: Axes) -> Linear:
            adapter = lora if lora and lora.covers(f"per_layer.{name}") else None
            return Linear(inside, outside, rngs=rngs, dtype=dtype, std=config.init_std, lora=adapter)

        self.activation = config.activation
        self.gate_proj, self.out_proj = linear("gate_proj", stream, inner), linear("out_proj", inner, stream)
        norm_class = module_class(config, "norm", RMSNorm)
        self.norm = norm_class(config, (config.hidden_size,), ("norm",), dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], of_layer: Float[Array, "B T P"], key: Array | None
    ) -> Float[Array, "B T D"]:
        """`key` turns on the dropout of the adapters."""
        keys = [None, None] if key is None else list(jax.random.split(key))
        gate = ACTIVATIONS[self.activation](self.gate_proj(x, keys[0]))
        return self.norm(self.out_proj(gate * of_layer, keys[1]))
