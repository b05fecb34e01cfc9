import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.cpu import matmul


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("kernel", "rank"), [((4, 7), 1), ((7, 4), 1), ((2, 6, 4), 2), ((4, 2, 6), 1)])
def test_project_tangent_and_its_transpose_are_tensordots(kernel, rank):
    x, d_kernel = normal(3, 5, *kernel[:rank]), normal(*kernel)
    actual, expected = (
        jax.vjp(function, d_kernel)
        for function in (
            lambda d_kernel: matmul.project_tangent(x, d_kernel, rank),
            lambda d_kernel: jnp.tensordot(x, d_kernel, rank),
        )
    )
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=1e-5)
    cotangent = normal(*expected[0].shape)
    np.testing.assert_allclose(actual[1](cotangent)[0], expected[1](cotangent)[0], rtol=0, atol=1e-5)


def test_outer_sums_over_rows_in_float32():
    x, y = normal(5, 3).astype(jnp.bfloat16), normal(5, 4).astype(jnp.bfloat16)
    actual = matmul.outer_product(x, y)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, x.astype(jnp.float32).T @ y.astype(jnp.float32), rtol=0, atol=1e-5)


def test_project_on_table_is_rows_times_the_transposed_table():
    rows, table = normal(5, 4), normal(7, 4)
    np.testing.assert_allclose(matmul.project_on_table(rows, table), rows @ table.T, rtol=0, atol=1e-5)
