"""The step of distillation from a teacher with another tokenizer, whose probabilities are signals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from updates import assert_same

from jaxtrain.config import MeshSection
from jaxtrain.objectives.uld import ULD
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step
from jaxtrain.types import Batch

LENGTHS = [[9, 11, 3], [14, 9], [23], [5, 5, 5], [1, 20], [16, 8], [2, 2, 2, 2], [24]]
STUDENT = {"num_layers": 1, "pattern": (tiny.KIND,)}
K = 5
OBJECTIVE = ULD(ce_weight=0.4, top_k=K)


def aligned_batch() -> Batch:
    """Random groups of weighted tokens, and a teacher's probabilities at their first ones."""
    batch, rng = tiny.packed_batch(LENGTHS, 24), np.random.default_rng(4)
    places = np.zeros(batch.tokens.shape, np.int32)
    for row, at in np.argwhere(batch.loss_weights > 0):
        goes_on = batch.segment_ids[row, at - 1] == batch.segment_ids[row, at] and rng.random() < 0.5
        places[row, at] = places[row, at - 1] + 1 if goes_on and places[row, at - 1] else rng.random() < 0.8
    probs = -np.sort(-rng.dirichlet(np.ones(K + 1), places.shape)).astype(np.float32)
    return batch._replace(signals={"group_place": places, "teacher_probs": probs * (places == 1)[..., None]})


def update(batch, mesh=None, preset="fsdp", microbatches=1):
    """(the gradient of the student's parameters, the report)."""
    model = tiny.model(mesh=mesh, **STUDENT)
    params = tiny.random_params(tiny.model(**STUDENT))
    if mesh is not None:
        params = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES[preset], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    tx = optax.sgd(1.0)
    step = jax.jit(make_step(model, tx, lambda step: jnp.ones(()), OBJECTIVE, microbatches=microbatches))
    state, report = step(new_state(params, tx, jax.random.key(0)), {}, batch)
    return jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params), jax.device_get(report)


@pytest.fixture(scope="module")
def whole():
    found = update(aligned_batch())
    assert found[1].means["uld"].value > 0.1 and found[1].grad_norm > 0.1
    return found


def test_microbatches_equal_one_batch(whole):
    assert_same(whole, update(aligned_batch(), microbatches=4))


def test_packed_equals_unpacked(whole):
    packed, rows = aligned_batch(), []
    for row in range(len(packed.tokens)):
        for number in range(1, packed.segment_ids[row].max() + 1):
            span = packed.segment_ids[row] == number

            def alone(column, row=row, span=span):
                return np.pad(column[row][span], [(0, 24 - span.sum())] + [(0, 0)] * (column.ndim - 2))

            rows.append(
                packed.map(alone)._replace(segment_ids=np.pad(np.ones(span.sum(), np.int32), (0, 24 - span.sum())))
            )
    assert_same(whole, update(jax.tree.map(lambda *each: np.stack(each), *rows)))


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_equal_one(whole, tensor):
    preset = "fsdp_tensor" if tensor > 1 else "fsdp"
    assert_same(whole, update(aligned_batch(), make_mesh(MeshSection(preset=preset, tensor=tensor)), preset))
