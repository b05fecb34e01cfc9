"""Rows whose tokens are sharded over the mesh axis "context" give the step of one device."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.nn.config import LayerKind
from jaxtrain.objectives.policies import GRPO
from jaxtrain.objectives.sft import SFT
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

# Segments begin and end on any device and span several; one row is padded.
LENGTHS = [[9, 20, 3], [32], [5, 5, 5], [1, 30]]
WINDOWS = tuple(replace(tiny.KIND, window=window) for window in (7, None))
FAMILIES = {
    "dense": {"num_layers": 2, "pattern": (tiny.KIND,) * 2},
    "window-softcap": {"pattern": WINDOWS, "num_layers": 2, "attention_softcap": 5.0, "logit_softcap": 8.0},
    "sinks-experts": {"pattern": WINDOWS, "num_layers": 2, "sinks": True, "moe": tiny.MOE, "tied": False},
}
MESHES = {
    "context8": MeshSection(context=8),
    "fsdp2-context4": MeshSection(context=4),
    "fsdp2-context2-tensor2": MeshSection(preset="fsdp_tensor", context=2, tensor=2),
    "expert2-fsdp2-context2": MeshSection(preset="fsdp_expert", context=2, expert=2),
}


def one_step(model, params, batch, mesh=None, preset="fsdp", objective=SFT(), microbatches=1):
    """The gradient, as the negative change of an optimizer of rate 1, and the report."""
    tx = optax.sgd(1.0)
    step = make_step(model, tx, lambda step: 0 * step, objective, microbatches=microbatches)
    placed = params
    if mesh is not None:
        placed = jax.device_put(params, param_specs(model.axes(), model.abstract(), RULES[preset], mesh))
        batch = jax.device_put(batch, batch_sharding(mesh))
    state, report = jax.jit(step)(new_state(placed, tx, jax.random.key(0)), {}, batch)
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, params), jax.device_get(report)


def assert_equal(one, other):
    for name, metric in one[1].means.items():
        np.testing.assert_allclose(metric.value, other[1].means[name].value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(one[1].grad_norm, other[1].grad_norm, rtol=1e-5)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one[0])[0], jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("dense", "context8"),
        ("dense", "fsdp2-context2-tensor2"),
        ("window-softcap", "fsdp2-context4"),
        ("window-softcap", "fsdp2-context2-tensor2"),
        ("sinks-experts", "expert2-fsdp2-context2"),
        ("sinks-experts", "context8"),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(family, mesh):
    section, batch = MESHES[mesh], tiny.packed_batch(LENGTHS, 32)
    single = tiny.model(remat="full", **FAMILIES[family])
    params = tiny.random_params(single)
    devices = make_mesh(section)
    sharded = tiny.model(remat="full", mesh=devices, **FAMILIES[family])
    assert_equal(one_step(single, params, batch), one_step(sharded, params, batch, devices, section.preset))
