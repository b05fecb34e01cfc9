import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.ops.cpu.exchange import ragged_all_to_all


def test_the_example_of_jaxs_documentation():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("a")
    of_both = [[1, 2, 2, 3, 4, 0], [0] * 8, [0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]]

    def exchange(*args):
        return ragged_all_to_all(*args, axis_name="a")

    result = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows))(*map(jnp.asarray, of_both))
    np.testing.assert_array_equal(result, [1, 3, 0, 0, 2, 2, 4, 0])


def test_slices_that_are_empty_or_not_sent_leave_the_output_alone():
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("a")
    operand = jnp.arange(1, 9).repeat(3).reshape(8, 3)  # 1 to 4 and 5 to 8
    output = -jnp.ones((8, 3), jnp.int32)
    # Two slices for each device: the first sends row 3 and rows 0 to 1 to itself, and 2 to the other at its row 3.
    starts = jnp.asarray([3, 0, 2, 0, 0, 0, 0, 0])
    sizes = jnp.asarray([1, 2, 1, 0, 0, 0, 0, 0])
    targets = jnp.asarray([0, 2, 3, 0, 0, 0, 0, 0])

    def exchange(*args):
        return ragged_all_to_all(*args, axis_name="a")

    moved = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=rows, out_specs=rows))
    result = moved(operand, output, starts, sizes, targets, sizes)
    np.testing.assert_array_equal(result[:, 0], [4, -1, 1, 2, -1, -1, -1, 3])
