import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs, blockwise_attention
from jaxtrain.ops.tpu.splash import splash_attention


@pytest.mark.parametrize("window", [None, 20])
def test_interpreted_splash_equals_blockwise_attention(window):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 130, heads, 64)), jnp.float32) for heads in (2, 1, 1))
    index = jnp.arange(130)[None]
    segments = jnp.where(index < 50, 1, 2)
    options = AttentionOptions(0.3, window, block=64)
    actual = splash_attention(q, k, v, segments, options, sinks=None, mesh=None, interpret=True)
    expected = blockwise_attention(q, k, v, None, MaskInputs(index, segments), options)
    np.testing.assert_allclose(actual, expected, atol=2e-5)
