import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.cache import OFF_TPU, ON_TPU, LayerCache, columns_of, empty_cache
from jaxtrain.nn.config import LayerKind

ORDERS = pytest.mark.parametrize("order", [ON_TPU, OFF_TPU], ids=["on-tpu", "off-tpu"])


def keys_and_values(columns):
    return (np.random.default_rng(seed).normal(size=(2, columns, 3, 4)).astype(np.float32) for seed in (0, 1))


@ORDERS
def test_the_order_of_axes_is_invisible(order):
    k, v = keys_and_values(5)
    cache = LayerCache.of(jnp.asarray(k), jnp.asarray(v), order)
    assert cache.columns == 5
    for actual, expected in zip(cache.all(), (k, v), strict=True):
        np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(cache.resized(3, 4).all(), (k, v), strict=True):
        np.testing.assert_array_equal(actual[:2], expected[:, :4])
        assert actual.shape == (3, 4, 3, 4) and not np.any(actual[2])


@ORDERS
def test_a_ring_keeps_the_last_tokens_and_no_padding(order):
    k, v = keys_and_values(7)
    zeros = jnp.zeros((2, 4, 3, 4))
    positions = jnp.arange(7)[None].repeat(2, 0)
    segments = jnp.asarray([[1] * 7, [1] * 3 + [0] * 4])
    length = jnp.asarray([7, 3])
    written = LayerCache.of(zeros, zeros, order).write(jnp.asarray(k), jnp.asarray(v), positions, segments, length)
    held = np.asarray(written.positions(length))
    np.testing.assert_array_equal(held, [[4, 5, 6, 3], [0, 1, 2, -1]])
    keys, _ = written.all()
    for row in range(2):
        for column, position in enumerate(held[row]):
            expected = k[row, position] if position >= 0 else np.zeros((3, 4))
            np.testing.assert_array_equal(keys[row, column], expected)


def test_a_layer_with_a_window_has_a_buffer_of_the_window():
    assert columns_of(LayerKind(5, None), 20) == 5
    assert columns_of(LayerKind(50, None), 20) == columns_of(LayerKind(None, None), 20) == 20
    config = tiny.model(pattern=(LayerKind(5, None), tiny.KIND, tiny.KIND)).config
    cache = empty_cache(config, 2, 20, jnp.dtype("bfloat16"), ON_TPU)
    assert [layer.columns for layer in cache.layers] == [5, 20, 20]
    assert cache.layers[0].k.dtype == jnp.bfloat16
