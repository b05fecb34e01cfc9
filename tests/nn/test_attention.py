import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxtrain.nn.attention import Attention, AttentionInputs
from jaxtrain.nn.config import LayerKind


def attention(**changes):
    config = tiny.model(**changes).config
    return tiny.build(Attention, config, rngs=nnx.Rngs(0), lora=None)


def apply(module, x, segments):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    inputs = AttentionInputs(positions, segments, (None,))
    return module(x, inputs, (LayerKind(None, None),), 0, None, [None] * 4, "xla", None)


def test_a_token_does_not_depend_on_later_tokens_or_other_segments():
    module = attention()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10, 64)), jnp.float32)
    segments = jnp.asarray([[1] * 4 + [2] * 6])
    out, _ = apply(module, x, segments)
    changed, _ = apply(module, x.at[:, 7].add(1), segments)
    np.testing.assert_array_equal(changed[:, :7], out[:, :7])
    assert np.all(np.any(changed[0, 7:] != out[0, 7:], -1))


def test_without_a_cache_the_keys_and_values_of_the_call_are_returned():
    module = attention()
    x = jnp.ones((2, 5, 64))
    _, written = apply(module, x, jnp.ones((2, 5), jnp.int32))
    keys, values = written.all()
    assert keys.shape == values.shape == (2, 5, 2, 16)
    np.testing.assert_allclose(values, module.v_proj(x), atol=1e-6)


@pytest.mark.parametrize(("qk_norm", "shape"), [("head", (16,)), ("all", (4, 16)), (None, None)])
def test_query_norm_is_over_each_head_or_over_all(qk_norm, shape):
    norm = attention(qk_norm=qk_norm).q_norm
    assert (norm is None) == (shape is None)
    assert norm is None or norm.scale.shape == shape
