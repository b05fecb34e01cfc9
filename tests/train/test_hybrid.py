"""The step of GOLD's distance: the same in microbatches and on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny
from updates import assert_same

from jaxtrain.config import MeshSection
from jaxtrain.objectives.gold import GOLD
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import MatchedHead, match_vocabularies
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

LENGTHS = [[9, 11, 3], [14, 9], [23], [5, 5, 5], [1, 20], [16, 8], [2, 2, 2, 2], [24]]
STUDENT = {"num_layers": 1, "pattern": (tiny.KIND,)}
OBJECTIVE = GOLD(ce_weight=0.3)


def update(mesh=None, preset="fsdp", microbatches=1):
    """(the gradient of the student's parameters, the report)."""
    batch, rng = tiny.packed_batch(LENGTHS, 24), np.random.default_rng(4)
    places = np.zeros(batch.tokens.shape, np.int32)
    for row, at in np.argwhere(batch.loss_weights > 0):
        goes_on = batch.segment_ids[row, at - 1] == batch.segment_ids[row, at] and rng.random() < 0.5
        places[row, at] = places[row, at - 1] + 1 if goes_on and places[row, at - 1] else rng.random() < 0.8
    first = places == 1
    hidden = rng.normal(size=(*places.shape, 8)).astype(np.float32) * first[..., None]
    further = -rng.exponential(size=places.shape).astype(np.float32) * first
    batch = batch._replace(signals={"group_place": places, "teacher_hidden": hidden, "teacher_further": further})
    size = tiny.CONFIG.vocab_size
    vocabularies = {str(n): n for n in range(size)}, {str(n + 60): n for n in range(60)}
    weight = rng.normal(size=(8, 60)).astype(np.float32)
    teacher = MatchedHead(Head(weight, 60), match_vocabularies(*vocabularies, size, 60))
    model = tiny.model(mesh=mesh, **STUDENT)
    params = tiny.random_params(tiny.model(**STUDENT))
    if mesh is not None:
        params = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES[preset], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    tx = optax.sgd(1.0)
    step = jax.jit(make_step(model, tx, lambda step: jnp.ones(()), OBJECTIVE, microbatches=microbatches))
    state, report = step(new_state(params, tx, jax.random.key(0)), {}, batch, teacher)
    return jax.tree.map(lambda old, new: np.asarray(old - new), params, state.params), jax.device_get(report)


def test_microbatches_and_eight_devices_equal_one_batch():
    whole = update()
    assert whole[1].means["matched"].value > 0.01 and whole[1].means["unmatched"].value > 0.01
    assert_same(whole, update(microbatches=4))
    assert_same(whole, update(make_mesh(MeshSection(preset="fsdp_tensor", tensor=2)), "fsdp_tensor"))
