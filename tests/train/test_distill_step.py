"""The step of distillation: exact divergences from the hidden states of a teacher of another width and depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from divergences import formula
from updates import STUDENT, assert_same, update

from jaxtrain.config import MeshSection
from jaxtrain.objectives.distill import Distill
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.types import Batch

LENGTHS = [[9, 11, 3], [14, 9], [23], [5, 5, 5], [1, 20], [16, 8], [2, 2, 2, 2], [24]]
TEACHER = {"hidden_size": 32, "num_layers": 2, "pattern": (tiny.KIND,) * 2, "tied": False, "vocab_multiple": 8}
MIXED = Distill(kind="jsd", beta=0.3, temperature=1.5, ce_weight=0.4)


def with_teacher(batch, mesh=None, preset="fsdp"):
    """The batch with the teacher's hidden states, and the teacher's head."""
    teacher = tiny.model(mesh=mesh, **TEACHER)
    params = tiny.random_params(tiny.model(**TEACHER), seed=3)
    if mesh is not None:
        params = jax.device_put(params, param_specs(teacher.axes(), teacher.abstract(), RULES[preset], mesh))
    hidden = jax.jit(teacher.hidden)(params, batch)
    return batch._replace(signals={"teacher_hidden": hidden}), teacher.head(params)


@pytest.fixture(scope="module")
def whole():
    return update(MIXED, *with_teacher(tiny.packed_batch(LENGTHS, 24)))


def test_metrics_are_those_of_all_logits(whole):
    batch, head = with_teacher(tiny.packed_batch(LENGTHS, 24))
    model = tiny.model(**STUDENT)
    params = tiny.random_params(model)
    student = np.asarray(model.logits(params, model.hidden(params, batch)), np.float64)[:, :-1]
    teacher = np.asarray(batch.signals["teacher_hidden"] @ head.weight, np.float64)[:, :-1, : head.vocab_size]
    weights = batch.loss_weights[:, 1:]
    logp = np.take_along_axis(student, batch.tokens[:, 1:, None], 2)[..., 0] - np.log(np.exp(student).sum(-1))
    divergence = formula(MIXED.divergence, student / 1.5, teacher / 1.5)
    expected = {"divergence": divergence, "ce_loss": -logp, "loss": divergence - 0.4 * logp}
    for name, values in expected.items():
        np.testing.assert_allclose(whole[1].means[name].value, np.average(values, weights=weights), rtol=2e-5)


def test_the_gradient_is_that_of_all_logits(whole):
    batch, head = with_teacher(tiny.packed_batch(LENGTHS, 24))
    model = tiny.model(**STUDENT)

    def loss(params):
        student = model.logits(params, model.hidden(params, batch))[:, :-1]
        teacher = (batch.signals["teacher_hidden"] @ head.weight)[:, :-1, : head.vocab_size]
        logp = jax.nn.log_softmax(student)
        log_p, log_q = jax.nn.log_softmax(student / 1.5), jax.nn.log_softmax(teacher / 1.5)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        log_m = jnp.log(0.3 * q + 0.7 * p)
        divergence = jnp.sum(0.3 * q * (log_q - log_m) + 0.7 * p * (log_p - log_m), -1)
        of_token = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], 2)[..., 0]
        return jnp.sum((divergence - 0.4 * of_token) * batch.loss_weights[:, 1:]) / batch.loss_weights.sum()

    expected = jax.jit(jax.grad(loss))(tiny.random_params(model))
    for a, b in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_microbatches_equal_one_batch(whole):
    assert_same(whole, update(MIXED, *with_teacher(tiny.packed_batch(LENGTHS, 24)), microbatches=4))


def test_packed_equals_unpacked(whole):
    packed = tiny.packed_batch(LENGTHS, 24)
    rows: list[list[np.ndarray]] = []
    for row in range(len(packed.tokens)):
        for number in range(1, packed.segment_ids[row].max() + 1):
            span = packed.segment_ids[row] == number
            pad = (0, 24 - span.sum())
            columns = (packed.tokens, packed.positions, np.minimum(packed.segment_ids, 1), packed.loss_weights)
            rows.append([np.pad(column[row][span], pad) for column in columns])
    tokens, positions, segments, weights = (np.stack(column) for column in zip(*rows, strict=True))
    assert_same(whole, update(MIXED, *with_teacher(Batch(tokens, positions, segments, weights))))


@pytest.mark.parametrize("tensor", [1, 2])
def test_eight_devices_equal_one(whole, tensor):
    preset = "fsdp_tensor" if tensor > 1 else "fsdp"
    mesh = make_mesh(MeshSection(preset=preset, tensor=tensor))
    placed = jax.device_put(tiny.packed_batch(LENGTHS, 24), batch_sharding(mesh))
    assert_same(whole, update(MIXED, *with_teacher(placed, mesh, preset), mesh=mesh, preset=preset))
