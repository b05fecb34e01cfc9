"""The roles of a run are declared without opening one, and a session declares the same."""

import jax
import pytest
import recipe_runs

from jaxtrain.config import load_config
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.session.roles import RunRoles
from jaxtrain.session.session import Session


@pytest.fixture
def config(tmp_path):
    return load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml")


def test_a_session_declares_the_roles_of_its_config(config):
    roles = RunRoles(config, make_mesh(config.mesh), jax.devices())
    alone = roles.trained_role("policy", config.objective).abstract_state()
    with Session.open(config) as session:
        within = session.trained_role("policy", config.objective).abstract_state()
    assert jax.tree.leaves(alone) == jax.tree.leaves(within)


def test_frozen_roles_are_on_the_last_devices(config):
    roles = RunRoles(config, make_mesh(config.mesh, jax.devices()[:6]), jax.devices())
    assert list(roles.frozen_mesh(2).devices.flat) == jax.devices()[6:]


def test_an_unknown_number_of_steps_is_an_error_that_says_what_to_do(config):
    endless = config.model_copy(update={"train": config.train.model_copy(update={"steps": None})})
    roles = RunRoles(endless, make_mesh(config.mesh), jax.devices())
    with pytest.raises(ValueError, match=r"open the data before `restore`, or set train.steps"):
        assert roles.num_steps
    roles.num_steps = 7
    assert roles.num_steps == 7
