import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.ops.exchange import at_owners, block_rows, plan_route, sort_into_slots

GROUPS, PAIRS = 8, 600  # of each of four devices, so that a buffer holds 1024 rows
CHOICES = {
    "even": lambda rng: rng.integers(0, GROUPS, 4 * PAIRS),
    "all choose one group": lambda rng: np.full(4 * PAIRS, 5),  # three rounds
    "one device is never chosen": lambda rng: rng.choice([0, 1, 4, 5, 6, 7], 4 * PAIRS),
    "each device chooses one other": lambda rng: np.repeat([2, 7, 0, 1], PAIRS),
}


@pytest.mark.parametrize("block", [1, 8])
def test_slots_are_sorted_by_group_and_groups_begin_at_blocks(block):
    group = np.random.default_rng(0).choice([0, 2, 3, 6], 50)
    slots = sort_into_slots(jnp.asarray(group), 7, block)
    assert np.array_equal(slots.sizes, -(-np.bincount(group, minlength=7) // block) * block)
    ends = np.cumsum(slots.sizes)
    assert len(slots.pairs) >= ends[-1]
    assert np.array_equal(slots.pairs[slots.places], np.arange(50))
    assert np.array_equal(np.searchsorted(ends, slots.places, side="right"), group)
    assert np.array_equal(np.flatnonzero(slots.real), np.sort(slots.places))


def outputs(params, rows, sizes):
    """Of group g: sin(g's parameter times x) times the weight of the row."""
    x, weights = rows
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    scales = params.at[group].get(mode="fill", fill_value=0)
    return jnp.sin(x * scales[:, None]) * weights[:, None]


def test_rows_travel_one_by_one_where_padding_would_be_more_than_an_eighth():
    assert block_rows(512, 8) == 8
    assert block_rows(511, 8) == 1


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_owners_compute_what_one_device_would(choice, block):
    rng = np.random.default_rng(0)
    group = jnp.asarray(choice(rng), jnp.int32)
    x, cotangent = (jnp.asarray(rng.normal(size=(4 * PAIRS, 3)), jnp.float32) for _ in range(2))
    weights = jnp.asarray(rng.normal(size=4 * PAIRS), jnp.float32)
    params = jnp.asarray(rng.normal(size=GROUPS), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("expert")

    def on_device(params, x, weights, group):
        params, x, weights, group = (jax.lax.pcast(a, "data", to="varying") for a in (params, x, weights, group))
        slots = sort_into_slots(group, GROUPS, block)
        route = plan_route(slots, block, "expert", ("data", "expert"))
        in_slots = x[slots.pairs], jnp.where(slots.real, weights[slots.pairs], 0)
        out = at_owners(outputs, "expert", block, params, in_slots, route)[slots.places]
        return jax.lax.psum(out, "data") / 2

    sharded = jax.shard_map(on_device, mesh=mesh, in_specs=rows, out_specs=rows)

    def direct(params, x, weights, group):
        return jnp.sin(x * params[group][:, None]) * weights[:, None]

    def values(function):
        y, backward = jax.vjp(lambda *inputs: function(*inputs, group), params, x, weights)
        return y, *backward(cotangent)

    for actual, expected in zip(jax.jit(values, static_argnums=0)(sharded), values(direct), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
