import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxtrain.nn.config import Lora
from jaxtrain.nn.linear import Axes, Linear


def linear(in_shape=(6,), out_shape=(2, 4), lora=None, bias=True):
    return tiny.build(
        Linear,
        Axes(in_shape, ("embed",) * len(in_shape)),
        Axes(out_shape, ("heads", "head_dim")[: len(out_shape)]),
        rngs=nnx.Rngs(0),
        std=0.1,
        bias=bias,
        lora=lora,
    )


@pytest.mark.parametrize(("in_shape", "out_shape"), [((6,), (2, 4)), ((2, 3), (5,))])
def test_the_output_is_the_kernel_product_plus_the_bias(in_shape, out_shape):
    module = linear(in_shape, out_shape)
    module.bias.set_value(jnp.arange(np.prod(out_shape), dtype=jnp.float32).reshape(out_shape))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, *in_shape)), jnp.float32)
    expected = jnp.tensordot(x, module.kernel[...], len(in_shape)) + module.bias[...]
    np.testing.assert_allclose(module(x), expected, atol=1e-6)


def test_a_new_adapter_changes_nothing_and_dropout_touches_the_adapter_alone():
    lora = Lora(rank=4, alpha=8.0, dropout=0.5, targets=("all-linear",))
    plain, module = linear(), linear(lora=lora)
    module.kernel.set_value(plain.kernel[...])
    x = jnp.ones((3, 6))
    np.testing.assert_array_equal(module(x), plain(x))
    module.lora_b.set_value(jnp.ones((4, 2, 4)))
    expected = plain(x) + 2 * jnp.tensordot(x @ module.lora_a[...], module.lora_b[...], 1)
    np.testing.assert_allclose(module(x), expected, atol=1e-6)
    dropped = module(x, jax.random.key(0))
    assert not np.allclose(dropped, expected)
    module.lora_b.set_value(jnp.zeros((4, 2, 4)))
    np.testing.assert_array_equal(module(x, jax.random.key(0)), plain(x))


def test_forward_mode_goes_through_a_linear():
    module = linear()
    graph, params = nnx.split(module)
    x = jnp.ones((3, 6))
    tangent = jax.tree.map(jnp.ones_like, params)
    _, moved = jax.jvp(lambda params: nnx.merge(graph, params)(x), (params,), (tangent,))
    np.testing.assert_allclose(moved, np.full((3, 2, 4), 7.0), atol=1e-6)  # 6 from the kernel, 1 from the bias
