"""The step of a trained role can be compiled in advance."""

import jax
import tiny

from jaxtrain.config import ModelSection, OptimizerSection, TrainSection
from jaxtrain.config.sections import MeshSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import TrainedRole, Update


def test_a_lowered_step_is_the_one_that_is_taken():
    section, optimizer = ModelSection(config=tiny.HF_CONFIG, compute_dtype="float32"), OptimizerSection()
    declared = declare(section, make_mesh(MeshSection()), "fsdp")
    schedule = make_schedule(optimizer, 10)
    tx = make_optimizer(optimizer, schedule, declared.trained_axes)
    role = TrainedRole("policy", section, declared, 0, Update(SFT(), tx, schedule, TrainSection()))
    role.load()
    batch = role.place(tiny.packed_batch([[9, 20, 3]] * jax.device_count(), 32))
    compiled = role.lower(batch).compile()
    assert role.step == 0  # not taken
    _, expected = compiled(jax.tree.map(lambda leaf: leaf.copy(), role.state), role.frozen, batch, role.teacher_head)
    assert float(role.update(batch).means["loss"].value) == float(expected.means["loss"].value)
    assert (role.step, role.compilations()) == (1, 0)  # it was compiled before, by `compile`
