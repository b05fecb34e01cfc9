import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxtrain.nn.mlp import ACTIVATIONS, GatedMLP

FUNCTIONS = {
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: jnp.maximum(x, 0),
    "relu2": lambda x: jnp.maximum(x, 0) ** 2,
}


def test_without_a_gate_the_up_projection_is_activated():
    config = tiny.model(activation="relu2", mlp_gate=False).config
    module = tiny.build(GatedMLP, config, rngs=nnx.Rngs(0), lora=None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    expected = FUNCTIONS["relu2"](x @ module.up_proj.kernel[...]) @ module.down_proj.kernel[...]
    np.testing.assert_allclose(module(x, [None] * 3), expected, atol=1e-5)
    assert module.gate_proj is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activated_gate_multiplies_the_up_projection(activation):
    config = tiny.model(activation=activation).config
    module = tiny.build(GatedMLP, config, rngs=nnx.Rngs(0), lora=None)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    gate, up, down = (each.kernel[...] for each in (module.gate_proj, module.up_proj, module.down_proj))
    expected = (FUNCTIONS[activation](x @ gate) * (x @ up)) @ down
    np.testing.assert_allclose(module(x, [None] * 3), expected, atol=1e-5)
