"""Six samples with random scores, and the comparison of a policy objective with a formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.rl.rollouts import pack
from jaxtrain.train.step import add_signals, batch_norm
from jaxtrain.types import Scores

LENGTHS = [3, 7, 5, 1, 6, 4]


def problem():
    """Six samples in two packed rows; one has an environment's tokens in its middle."""
    rng = np.random.default_rng(0)
    trajectories = [trajectory(2, n, sample=i) for i, n in enumerate(LENGTHS)]
    trajectories[1] = trajectories[1]._replace(loss_mask=np.array([1, 1, 0, 0, 1, 1, 1], bool))
    old = [t.sampler_logps + rng.normal(0, 0.3, n).astype(np.float32) for t, n in each(trajectories, LENGTHS)]
    new = [o + rng.normal(0, 0.3, len(o)).astype(np.float32) for o in old]
    ref = [o + rng.normal(0, 0.3, len(o)).astype(np.float32) for o in old]
    advantages = [np.full(n, a, np.float32) for n, a in each(LENGTHS, [1.0, -0.5, 2.0, -1.5, 0.7, -2.0])]
    packed = pack(trajectories, 24, rows=2)
    packed = packed.spread(old_logps=old, ref_logps=ref, advantages=advantages, new=new)
    masks = [t.loss_mask for t in trajectories]
    sampler = [t.sampler_logps for t in trajectories]
    own = [
        [values[mask].astype(np.float64) for values, mask in each(column, masks)] for column in (new, old, ref, sampler)
    ]
    return packed.batch, own, np.array([a[0] for a in advantages], np.float64)


def each(*columns):
    return zip(*columns, strict=True)


def run(batch, objective, drop=()):
    signals = {name: value for name, value in batch.signals.items() if name not in drop}
    batch = batch._replace(signals=signals)

    def scores(logp):
        scored = jnp.where(batch.loss_weights > 0, logp, 0)
        return Scores(scored, jax.lax.stop_gradient(-scored), scored)

    batch = add_signals(objective, lambda *needs: scores(batch.signals["new"]), batch)

    def of(logp):
        return objective(scores(logp), batch, batch_norm(batch))

    (value, metrics), gradient = jax.value_and_grad(of, has_aux=True)(jnp.asarray(batch.signals["new"]))
    return float(value), metrics, np.asarray(gradient)


def clipped(ratio, advantage, low, high):
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def check_loss_and_gradient(problem, objective, formula, held=False):
    """Value and gradient, by differences of the formula `(new, old, ref, sampler, advantages)`.

    `held`: the formula takes the log-probabilities of weights without gradient as `held`.
    """
    batch, (new, old, ref, sampler), advantages = problem
    value, _, gradient = run(batch, objective)
    assert value == pytest.approx(formula(new, old, ref, sampler, advantages), rel=2e-5)
    # The first token of every sample that has one, in the order of the samples.
    for index in range(len(new)):

        def moved(step, index=index):
            shifted = [n.copy() for n in new]
            shifted[index][0] += step
            return formula(shifted, old, ref, sampler, advantages, **({"held": new} if held else {}))

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        row, column = np.argwhere(np.isclose(batch.signals["new"], new[index][0], atol=0))[0]
        assert gradient[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not gradient[batch.loss_weights == 0].any()
