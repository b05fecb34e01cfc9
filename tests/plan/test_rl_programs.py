"""The planned programs of recipe rl have the arguments of those that a rollout and an update run."""

import jax
import pytest
import recipe_runs

from jaxtrain.config import load_config
from jaxtrain.plan.rl_programs import rl_programs
from jaxtrain.recipes.run import run
from jaxtrain.roles.role import Role, TrainedRole
from jaxtrain.sample import decode as engine


class _EnoughSeenError(Exception):
    pass


def arguments(tree):
    """Shape, type and sharding of every array."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in flat
    }


def first_step(config, monkeypatch):
    """What the first step of a real run gives to its programs, by name; the step itself is not taken."""
    found = {}
    (prefill, decode), score = engine.with_options(()), Role._score

    def decoded(model, limits, params, memory, *rest):
        found["decode"] = arguments((params, memory))  # the last call has the most columns
        return decode(model, limits, params, memory, *rest)

    def scored(role, key, batch, function):
        found.setdefault(role.name, arguments((role.params, batch.map(role_placed(role)))))
        return score(role, key, batch, function)

    def role_placed(role):
        return lambda leaf: jax.device_put(leaf, jax.sharding.NamedSharding(role.mesh, jax.sharding.PartitionSpec()))

    def update(role, batch):
        found["update"] = {name: array.dtype for name, array in batch.arrays().items()}
        raise _EnoughSeenError

    with monkeypatch.context() as patches:
        patches.setattr(engine, "with_options", lambda options: (prefill, decoded))
        patches.setattr(Role, "_score", scored)
        patches.setattr(TrainedRole, "update", update)
        with pytest.raises(_EnoughSeenError):
            run(config)
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective.beta=0.1", "rl.iterations=2", "sampling.top_k=4"],
        ["rl.algorithm=ppo", "mesh.preset=fsdp_tensor", "mesh.tensor=2"],
    ],
    ids=["grpo", "kl", "ppo"],
)
def test_the_planned_programs_have_the_arguments_of_the_run(tmp_path, monkeypatch, overrides):
    config = load_config(recipe_runs.prepare(tmp_path, "rl") / "run.yaml", overrides)
    programs = {program.name: program for program in rl_programs(config, jax.devices())}
    real = first_step(config, monkeypatch)
    inputs = programs["decode"].inputs
    planned = arguments((inputs["engine's parameters"], inputs["cache"]))
    assert planned.keys() == real["decode"].keys()
    columns = config.data.max_length
    for path, (shape, kind, shard) in real["decode"].items():
        if path.startswith("[0]"):  # parameters; the run's cache has the columns of its own, shorter samples
            assert planned[path] == (shape, kind, shard), path
        else:
            assert planned[path][1] == kind, path
            assert columns in planned[path][0] or planned[path][0] == shape, path
    batch = programs["update"].inputs["batch"]
    assert {name: leaf.dtype for name, leaf in batch.arrays().items()} == {
        name: jax.dtypes.canonicalize_dtype(kind) for name, kind in real["update"].items()
    }
    scored = {"reference": "reference", "policy": "score", "critic": "values"}
    assert {scored[name] for name in real if name in scored} == programs.keys() & set(scored.values())


def test_colocated_phases_hold_what_other_phases_need(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "rl") / "run.yaml", ["objective.beta=0.1"])
    programs = rl_programs(config, jax.devices())
    names = [program.name for program in programs]
    assert names == ["merge", "reshard", "prefill", "decode", "reference", "update"]
    kinds = {kind for program in programs for kind in program.inputs}
    assert {"parameters", "optimizer", "reference's parameters", "engine's parameters", "cache"} <= kinds


def test_under_disjoint_the_engine_is_on_its_own_devices(tmp_path):
    overrides = ["rl.placement.kind=disjoint", "rl.placement.rollout_devices=4"]
    config = load_config(recipe_runs.prepare(tmp_path, "rl") / "run.yaml", overrides)
    programs = {program.name: program for program in rl_programs(config, jax.devices())}
    mine, others = (set(programs[name].mesh.devices.flat) for name in ("decode", "update"))
    assert len(mine) == len(others) == 4
    assert not mine & others
    assert "reshard" not in programs  # a transfer, no program


def test_slots_that_do_not_divide_are_an_error(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "rl") / "run.yaml", ["rl.slots=12"])
    with pytest.raises(ValueError, match=r"rl.slots=12 must be a multiple of .* = 8"):
        rl_programs(config, jax.devices())
