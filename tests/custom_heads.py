"""Heads that tests use by import path."""

import jax.numpy as jnp
from flax import nnx

from jaxtrain.nn.heads import CustomHead


class LowRank(CustomHead):
    """A head with a low-rank layer."""

    def __init__(self, config, *, rngs, dtype):
        normal = nnx.initializers.normal(config.init_std)
        self.down = nnx.Param(normal(rngs.params(), (config.hidden_size, 8), dtype), out_sharding=("embed", None))
        kernel = normal(rngs.params(), (8, config.padded_vocab), dtype)
        self.kernel = nnx.Param(kernel, out_sharding=("embed", "vocab"))

    def features(self, hidden):
        return jnp.tanh(hidden @ self.down[...].astype(hidden.dtype))


def low_rank(config, *, rngs, dtype):
    return LowRank(config, rngs=rngs, dtype=dtype)


def no_head(config, *, rngs, dtype):
    return nnx.Linear(2, 2, rngs=rngs)
