from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.norm import RMSNorm


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(8,), (2, 4)])
def test_the_root_mean_square_over_the_last_axes_is_the_scale(shape, offset):
    config = replace(tiny.CONFIG, norm_offset=offset, norm_eps=1e-12)
    norm = tiny.build(RMSNorm, config, shape, (None,) * len(shape))
    x = 5 * jnp.asarray(np.random.default_rng(0).normal(size=(3, *shape)), jnp.float32)
    over = tuple(range(-len(shape), 0))
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, over), np.ones(3), rtol=1e-5)
    norm.scale.set_value(norm.scale[...] + 1)
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, over), np.full(3, 4.0), rtol=1e-5)


@pytest.mark.parametrize("wide", [False, True])
def test_the_result_has_the_dtype_of_the_input(wide):
    norm = tiny.build(RMSNorm, replace(tiny.CONFIG, norm_in_float32=wide), (8,), ("norm",))
    assert norm(jnp.ones((2, 8), jnp.bfloat16)).dtype == jnp.bfloat16
