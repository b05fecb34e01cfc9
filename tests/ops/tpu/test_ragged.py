import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.ops.tpu import ragged

SIZES = {
    "no multiple of a block": [70, 0, 1, 529, 0, 40],
    "one takes all": [0, 640, 0, 0, 0, 0],
    "rows of nobody": [3, 0, 64, 65, 0, 1],
    "nothing": [0] * 6,
}
WIDTHS = {"one block": (8, 24), "the last of several blocks is partial": (1100, 24)}


def problem(inside, outside, sizes, dtype):
    """Rows of nobody are not numbers: whatever is made of them is not seen."""
    rng = np.random.default_rng(0)
    x, kernels, g = (rng.normal(size=s) for s in ((640, inside), (6, inside, outside), (640, outside)))
    x[sum(sizes) :] = g[sum(sizes) :] = np.nan
    return *(jnp.asarray(array, dtype) for array in (x, kernels, g)), jnp.asarray(sizes, jnp.int32)


def by_group(function, sizes, rows):
    """`function` of each group and the slice of its rows."""
    ends = np.cumsum(sizes)
    return [function(i, slice(end - size, end)) for i, (end, size) in enumerate(zip(ends, sizes, strict=True))]


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_kernels_multiply_each_group_by_its_matrix(sizes, widths):
    x, kernels, g, counts = problem(*widths, sizes, "float32")

    def dot(a, b):
        return np.asarray(a) @ np.asarray(b)

    def with_zeros(rows):
        return np.concatenate([*rows, np.zeros((640 - sum(sizes), rows[0].shape[1]))])

    expected = with_zeros(by_group(lambda i, rows: dot(x[rows], kernels[i]), sizes, x))
    transposed = with_zeros(by_group(lambda i, rows: dot(g[rows], kernels[i].T), sizes, g))
    outer = np.stack(by_group(lambda i, rows: dot(x[rows].T, g[rows]), sizes, x))
    y = ragged.grouped_matmul(x, kernels, counts, interpret=True)
    d_x = ragged.grouped_matmul(g, kernels, counts, transpose=True, interpret=True)
    np.testing.assert_allclose(y, expected, atol=3e-4)
    np.testing.assert_allclose(d_x, transposed, atol=3e-4)
    np.testing.assert_allclose(ragged.grouped_outer(x, g, counts, interpret=True), outer, atol=3e-4)


def test_sixteen_bit_rows_are_summed_in_float32():
    sizes = SIZES["no multiple of a block"]
    x, kernels, g, counts = problem(8, 24, sizes, "bfloat16")
    outer = by_group(lambda i, rows: np.float32(x[rows].T) @ np.float32(g[rows]), sizes, x)
    actual = ragged.grouped_outer(x, g, counts, interpret=True)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, jnp.asarray(np.stack(outer), jnp.bfloat16))
    y = ragged.grouped_matmul(x, kernels, counts, interpret=True)
    np.testing.assert_allclose(np.float32(y), np.float32(lax.ragged_dot(x, kernels, counts)), rtol=0.01, atol=0.01)


def test_each_device_of_a_shard_map_calls_the_kernels():
    """Lowered for TPUs; the interpreter loses the types of a `shard_map`."""
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("expert")

    def both(x, kernels, g, counts):
        y, outer = ragged.grouped_matmul(x, kernels, counts), ragged.grouped_outer(x, g, counts)
        assert jax.typeof(y).manual_axis_type.varying == jax.typeof(outer).manual_axis_type.varying == {"expert"}
        return y, outer

    arguments = [jnp.concatenate([a, a]) for a in problem(8, 24, SIZES["rows of nobody"], "float32")]
    traced = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=rows, out_specs=rows)).trace(*arguments)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("custom_call @tpu_custom_call") == 2
