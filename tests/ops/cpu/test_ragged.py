import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain.ops.cpu import ragged

SIZES = {"several tiles": [70, 0, 130, 3], "rows of no group": [1, 64, 65, 0], "no rows at all": [0, 0, 0, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_tiles_give_what_ragged_dot_gives(sizes):
    rng = np.random.default_rng(0)
    x, kernels, g = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((203, 4), (4, 4, 6), (203, 6)))
    counts = jnp.asarray(sizes, jnp.int32)
    expected = np.where(np.arange(203)[:, None] < sum(sizes), lax.ragged_dot(x, kernels, counts), 0)
    np.testing.assert_allclose(ragged.grouped_matmul(x, kernels, counts), expected, rtol=0, atol=1e-5)
    ends = np.cumsum(sizes)
    x, g = (rows.at[ends[-1] :].set(jnp.nan) for rows in (x, g))  # of no group
    outer = [x[end - size : end].T @ g[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    np.testing.assert_allclose(ragged.grouped_outer(x, g, counts), outer, rtol=0, atol=1e-4)
