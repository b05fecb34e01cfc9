"""The reference shares the weights that the policy does not train."""

import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import LoraSection, MeshSection, ModelSection, OptimizerSection, TrainSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.reference import reference_role
from jaxtrain.roles.role import TrainedRole, Update


@pytest.mark.parametrize("lora", [None, LoraSection(rank=2)], ids=["full", "lora"])
def test_it_is_the_initial_model_also_after_updates(lora):
    section = ModelSection(config=tiny.HF_CONFIG, compute_dtype="float32", lora=lora)
    declared = declare(section, make_mesh(MeshSection()), "fsdp")
    tx = make_optimizer(OptimizerSection(), lambda step: 0.1, declared.trained_axes)
    policy = TrainedRole("policy", section, declared, 0, Update(SFT(), tx, lambda step: 0.1, TrainSection()))
    assert not policy.restored
    policy.load()
    batch = tiny.packed_batch([[9, 7]] * 8, 16)
    before = np.asarray(policy.logps(batch))
    policy.update(policy.place(batch))
    reference = reference_role(policy)
    np.testing.assert_allclose(np.asarray(reference.logps(batch)), before, atol=1e-6)
    assert np.abs(np.asarray(policy.logps(batch)) - before).max() > 1e-3
    shared = {id(leaf) for leaf in jax.tree.leaves(policy.frozen)}
    assert (shared == {id(leaf) for leaf in jax.tree.leaves(reference.params)}) == (lora is not None)
