import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxtrain.ops.ragged import copies_of_tokens, grouped_matmul, sums_of_slots

SIZES = {
    "uneven": [70, 0, 1, 129, 0, 40],
    "one takes all": [0, 240, 0, 0, 0, 0],
    "rows of nobody": [3, 0, 64, 65, 0, 1],
    "nothing": [0] * 6,
}


def problem(dtype=jnp.float32):
    x, kernels, g = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(240, 8), (6, 8, 12), (240, 12)])
    )
    return x, kernels, g


def by_hand(x, kernels, sizes):
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = jnp.einsum("mi,mio->mo", x[: len(group)], kernels[group], precision=lax.Precision.HIGHEST)
    return jnp.pad(rows, ((0, len(x) - len(group)), (0, 0)))


@pytest.fixture(scope="module")
def ours():
    def of(x, kernels, sizes, g):
        y, backward = jax.vjp(lambda x, kernels: grouped_matmul(x, kernels, sizes), x, kernels)
        return y, *backward(g)

    return jax.jit(of)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_row_meets_the_matrix_of_its_group(ours, sizes):
    x, kernels, g = problem()
    y, backward = jax.vjp(lambda x, kernels: by_hand(x, kernels, sizes), x, kernels)
    for actual, expected in zip(ours(x, kernels, jnp.asarray(sizes), g), (y, *backward(g)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=3e-5)


def test_cpu_and_other_platforms_compute_the_same():
    """`ragged_dot` and its transpose are what other platforms run; here the loop over tiles is."""
    from jaxtrain.ops import ragged
    from jaxtrain.ops.cpu import ragged as cpu

    x, kernels, g = problem()
    sizes = jnp.asarray(SIZES["rows of nobody"])
    np.testing.assert_allclose(cpu.grouped_matmul(x, kernels, sizes), lax.ragged_dot(x, kernels, sizes), atol=1e-5)
    np.testing.assert_allclose(cpu.grouped_outer(x, g, sizes), ragged._ragged_outer(x, g, sizes), atol=3e-5)


def lowered(platform):
    x, kernels, g = problem()
    sizes = jax.ShapeDtypeStruct((6,), jnp.int32)

    def all_three(x, kernels, sizes):
        y, backward = jax.vjp(lambda x, kernels: grouped_matmul(x, kernels, sizes), x, kernels)
        return y, *backward(g)

    return jax.jit(all_three).trace(x, kernels, sizes).lower(lowering_platforms=(platform,)).as_text()


def test_tpus_multiply_by_kernels():
    """`ragged_dot` itself, and its transpose that is dense there, appear nowhere."""
    text = lowered("tpu")
    assert text.count("custom_call @tpu_custom_call") == 3
    assert "ragged" not in text


def test_other_platforms_lower_to_ragged_dot():
    text = lowered("cuda")
    assert "while" not in text
    assert "ragged" in text


@pytest.mark.parametrize("padding", [0, 3])
def test_sums_of_slots_are_the_transpose_of_copies(padding):
    rng = np.random.default_rng(0)
    places = jnp.asarray(rng.permutation(20 + padding)[:20].reshape(10, 2))
    tokens = jnp.full(20 + padding, 4).at[places].set(jnp.arange(10)[:, None])
    x, y = (jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32) for rows in (10, 20 + padding))

    copies, back = jax.vjp(lambda x: copies_of_tokens(x, tokens, places), x)
    sums, forth = jax.vjp(lambda y: sums_of_slots(y, tokens, places), y)
    np.testing.assert_array_equal(copies, x[tokens])
    np.testing.assert_allclose(sums, y[places].sum(1), atol=1e-6)
    np.testing.assert_array_equal(back(y)[0], sums)
    np.testing.assert_array_equal(forth(x)[0], copies)
