"""Weights that travel to a sampler are the trainer's, merged and cast, in buffers of their own."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import samplers
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.sync import WeightSync, rollout_model

BATCH = tiny.packed_batch([[9, 6]] * 8, 16)


def logits(model, params):
    return np.asarray(model.logits(params, model.hidden(params, BATCH)))


FULL_EMBEDDING = replace(tiny.LORA, full_paths=("embed.weight", "norm.scale"))


@pytest.mark.parametrize("lora", [None, tiny.LORA, FULL_EMBEDDING], ids=["full", "lora", "lora and embedding"])
def test_the_rollout_model_computes_what_the_trainer_does(lora):
    mesh = make_mesh(MeshSection())
    model, params = samplers.trained(mesh, lora)
    rollout = rollout_model(model, mesh)
    synced = WeightSync(model, rollout)(params)
    assert rollout.lora is None and jax.tree.structure(synced.params) == jax.tree.structure(rollout.abstract())
    np.testing.assert_allclose(logits(rollout, synced.params), logits(model, params), atol=1e-5)
    assert synced.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(synced.params))


def test_donating_the_trainers_parameters_leaves_the_samplers_alone():
    mesh = make_mesh(MeshSection())
    model, params = samplers.trained(mesh)
    synced = WeightSync(model, rollout_model(model, mesh))(params)
    before = jax.tree.map(np.array, synced.params)
    changed = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(params)
    jax.block_until_ready(changed)
    jax.tree.map(np.testing.assert_array_equal, synced.params, before)
