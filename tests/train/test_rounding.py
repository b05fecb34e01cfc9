"""Stochastic rounding keeps in expectation what rounding to the nearest loses."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxtrain.config import OptimizerSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.train.rounding import round_stochastically
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step


def test_a_value_becomes_one_of_its_neighbours_with_its_own_mean():
    values = jnp.asarray([1.001, -3.3, 1e-20, 257.3], jnp.float32)
    draws = 20_000
    found = np.asarray(round_stochastically(jnp.tile(values, (draws, 1)), jax.random.key(0)), np.float32)
    for column, value in zip(found.T.astype(float), np.asarray(values, float).tolist(), strict=True):
        low, high = np.unique(column).tolist()
        assert low < value < high
        assert float(np.nextafter(jnp.bfloat16(low), jnp.bfloat16(high))) == high
        share = (value - low) / (high - low)
        assert abs(column.mean() - value) < 5 * (high - low) * (share * (1 - share) / draws) ** 0.5


def test_what_bfloat16_holds_and_what_is_not_finite_is_kept():
    values = jnp.asarray([0.0, 1.0, -2.5, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(5):
        found = round_stochastically(values, jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(found, np.float32), values)


def test_bfloat16_parameters_move_as_float32_ones_do():
    """By updates that rounding to the nearest loses: the loss falls only with the other rounding."""
    model, batch = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1]), tiny.packed_batch([[14, 14], [31]], 32)
    start = tiny.random_params(model)

    def trained(dtype, rounding):
        section = OptimizerSection(learning_rate=3e-5, schedule="constant", rounding=rounding)
        schedule = make_schedule(section, 100)
        tx = make_optimizer(section, schedule, model.axes())
        step = jax.jit(make_step(model, tx, schedule, SFT()))
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype), start)
        state, losses = new_state(params, tx, jax.random.key(0)), []
        for _ in range(30):
            state, report = step(state, {}, batch)
            losses.append(float(report.means["loss"].value))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.params))
        assert ("updates_lost_to_rounding" in report.means) == (dtype != jnp.float32 and rounding == "nearest")
        return losses[0] - losses[-1]

    exact, nearest, stochastic = (
        trained(*each) for each in ((jnp.float32, "nearest"), (jnp.bfloat16, "nearest"), (jnp.bfloat16, "stochastic"))
    )
    assert abs(stochastic - exact) < 0.25 * exact
    assert abs(nearest - exact) > 0.5 * exact
