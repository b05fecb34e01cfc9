"""The step of a trained role can be compiled in advance."""

import jax
import numpy as np
import tiny

from jaxtrain.config import ModelSection, OptimizerSection, TrainSection
from jaxtrain.config.sections import MeshSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import TrainedRole, Update


def trained_role():
    section, optimizer = ModelSection(config=tiny.HF_CONFIG, compute_dtype="float32"), OptimizerSection()
    declared = declare(section, make_mesh(MeshSection()), "fsdp")
    schedule = make_schedule(optimizer, 10)
    tx = make_optimizer(optimizer, schedule, declared.trained_axes)
    role = TrainedRole("policy", section, declared, 0, Update(SFT(), tx, schedule, TrainSection()))
    role.load()
    return role, role.place(tiny.packed_batch([[9, 20, 3]] * jax.device_count(), 32))


def test_a_lowered_step_is_the_one_that_is_taken():
    role, batch = trained_role()
    compiled = role.lower(batch).compile()
    assert role.step == 0  # not taken
    _, expected = compiled(jax.tree.map(lambda leaf: leaf.copy(), role.state), role.frozen, batch, role.teacher_head)
    assert float(role.update(batch).means["loss"].value) == float(expected.means["loss"].value)
    assert (role.step, role.compilations()) == (1, 0)  # it was compiled before, by `compile`


def test_an_optimizer_that_waited_on_the_host_takes_the_same_steps():
    (kept, batch), (waited, _) = trained_role(), trained_role()
    for _ in range(2):
        before = jax.tree.leaves(waited.state.opt_state)
        waited.wait_on_host()
        waited.wait_on_host()  # it is there already
        assert all(leaf.is_deleted() for leaf in before) and waited.params is not None
        reports = [role.update(batch) for role in (kept, waited)]
        first, second = (float(report.means["loss"].value) for report in reports)
        assert first == second
    assert waited.compilations() == 1
    for a, b in zip(jax.tree.leaves(kept.state), jax.tree.leaves(waited.state), strict=True):
        assert a.sharding == b.sharding
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
