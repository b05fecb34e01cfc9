import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.ops.varying import untyped, varying_as, varying_over


def on_two_devices(function, x, out_specs):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=out_specs))(x)


def test_outside_a_shard_map_nothing_changes():
    x = jnp.ones(3)
    assert varying_as(x, jnp.zeros(3)) is x
    assert untyped(jnp.sin, x).tolist() == jnp.sin(x).tolist()


def test_a_constant_takes_the_type_of_an_array():
    def function(x):
        zeros = varying_as(jnp.zeros(2), x)
        assert jax.typeof(zeros).manual_axis_type.varying == {"a"}
        return varying_over(zeros, ("a",)) + x

    assert on_two_devices(function, jnp.arange(4.0), PartitionSpec("a")).tolist() == [0, 1, 2, 3]


def test_the_result_of_a_kernel_has_the_type_of_its_input():
    def function(x):
        y = untyped(lambda x: 2 * x, x)
        assert jax.typeof(y).manual_axis_type.varying == {"a"}
        return y

    assert on_two_devices(function, jnp.arange(4.0), PartitionSpec("a")).tolist() == [0, 2, 4, 6]
