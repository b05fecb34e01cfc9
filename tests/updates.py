"""What one step of training does, as the tests of steps compare it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from jaxtrain.nn.block import Execution
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

STUDENT = {"num_layers": 1, "pattern": (tiny.KIND,)}


def update(objective, batch, teacher=None, mesh=None, preset="fsdp", microbatches=1):
    """(the gradient of a student's parameters, the report). `teacher`: its head, if the objective reads it."""
    model = tiny.model(mesh=mesh, **STUDENT)
    params = tiny.random_params(tiny.model(**STUDENT))
    if mesh is not None:
        params = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES[preset], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    tx = optax.sgd(1.0)
    step = jax.jit(make_step(model, tx, lambda step: jnp.ones(()), objective, microbatches=microbatches))
    state, report = step(new_state(params, tx, jax.random.key(0)), {}, batch, teacher)
    return jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params), jax.device_get(report)


def group_places(batch, rng):
    """The places of weighted tokens within random groups of neighbours; some are in none."""
    places = np.zeros(batch.tokens.shape, np.int32)
    for row, at in np.argwhere(batch.loss_weights > 0):
        goes_on = batch.segment_ids[row, at - 1] == batch.segment_ids[row, at] and rng.random() < 0.5
        places[row, at] = places[row, at - 1] + 1 if goes_on and places[row, at - 1] else rng.random() < 0.8
    return places


def assert_same(one, other):
    """`one` and `other` are pairs of the changes of the parameters and a step's report."""
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)
    for name, metric in one[1].means.items():
        np.testing.assert_allclose(metric.value, other[1].means[name].value, rtol=2e-5, err_msg=name)


def assert_sharded_equals_single(single, batch, mesh, preset):
    """A loss of the hidden states and its gradients are the same on a mesh, rematerialised. Returns the gradients."""
    sharded = dataclasses.replace(single, run=Execution(jnp.dtype("float32"), "full", "auto", mesh))
    params = tiny.random_params(single)
    placed = jax.device_put(params, param_specs(single.axes(), single.abstract(), RULES[preset], mesh))

    def loss(model):
        def of(params):
            return jnp.sum(jnp.sin(model.hidden(params, batch)) * (batch.segment_ids > 0)[..., None])

        return jax.jit(jax.value_and_grad(of))

    (one, grads), (other, expected) = loss(sharded)(placed), loss(single)(params)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for (path, leaf), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, theirs, atol=1e-4 * np.abs(theirs).max() + 1e-6, err_msg=str(path))
    return expected
