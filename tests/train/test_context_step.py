"""Rows whose tokens are sharded over the mesh axis "context" give the step of one device."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.objectives.policies import GRPO
from jaxtrain.objectives.sft import SFT
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

# Segments begin and end on any device and span several; one row is padded.
LENGTHS = [[9, 20, 3], [32], [5, 5, 5], [1, 30]]
WINDOWS = {"num_layers": 2, "pattern": tuple(replace(tiny.KIND, window=window) for window in (7, None))}
FAMILIES = {
    "dense": {"num_layers": 2, "pattern": (tiny.KIND,) * 2},
    "windows-softcap": {**WINDOWS, "attention_softcap": 5.0, "logit_softcap": 8.0},
    "sinks-experts": {**WINDOWS, "sinks": True, "moe": tiny.MOE, "tied": False},
}
MESHES = {
    "context8": MeshSection(context=8),
    "fsdp2-context2-tensor2": MeshSection(preset="fsdp_tensor", context=2, tensor=2),
    "fsdp2-expert2-context2": MeshSection(preset="fsdp_expert", context=2, expert=2),
}


def batch_of(objective):
    batch, rng = tiny.packed_batch(LENGTHS, 32), np.random.default_rng(1)
    signals = {name: rng.normal(size=batch.tokens.shape).astype(np.float32) for name in objective.signals}
    return batch._replace(signals=signals)


def one_step(model, params, objective, mesh=None, preset="fsdp"):
    """The gradient, as the negative change of an optimizer of rate 1, and the report."""
    batch, tx = batch_of(objective), optax.sgd(1.0)
    placed = params
    if mesh is not None:
        placed = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES[preset], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_step(model, tx, lambda step: 0 * step, objective)
    state, report = jax.jit(step)(new_state(placed, tx, jax.random.key(0)), {}, batch)
    change = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, params)
    return change, jax.device_get(report)


@pytest.mark.parametrize(
    ("family", "mesh", "objective"),
    [
        ("dense", "context8", SFT()),
        ("dense", "context8", GRPO()),  # divides by the tokens of a sample, of which a device has a part
        ("windows-softcap", "fsdp2-context2-tensor2", SFT()),
        ("sinks-experts", "fsdp2-expert2-context2", SFT()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_loss_and_gradients_are_those_of_one_device(family, mesh, objective):
    section = MESHES[mesh]
    single = tiny.model(remat="full", **FAMILIES[family])
    params, devices = tiny.random_params(single), make_mesh(section)
    sharded = tiny.model(remat="full", mesh=devices, **FAMILIES[family])
    expected, report = one_step(single, params, objective)
    found, sharded_report = one_step(sharded, params, objective, devices, section.preset)
    for name, metric in report.means.items():
        value = metric.value
        np.testing.assert_allclose(sharded_report.means[name].value, value, rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(sharded_report.grad_norm, report.grad_norm, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4, err_msg=jax.tree_util.keystr(path))
