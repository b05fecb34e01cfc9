"""Traces of steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import recipe_runs
import tiny

from jaxtrain.config import load_config
from jaxtrain.observe.profile import StepProfile
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.session.roles import RunRoles


def test_the_steps_are_traced_and_the_trace_ends_with_the_run(tmp_path):
    waits = []
    with StepProfile(tmp_path, [2, 5], lambda: waits.append(True)) as profile:
        for step in range(1, 4):
            profile.before(step)
            assert bool(waits) == (step >= 2)
            jnp.ones(step).sum().block_until_ready()
            profile.after(step)
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with StepProfile(tmp_path / "none", None, lambda: waits.append(True)) as profile:
        profile.before(1)
        profile.after(1)
    assert len(waits) == 1 and not (tmp_path / "none").exists()


def test_parts_of_a_step_have_their_names(tmp_path):
    config = load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml")
    role = RunRoles(config, make_mesh(config.mesh), jax.devices()).trained_role("policy", config.objective)
    batch = tiny.packed_batch([[9, 20, 3]] * config.train.batch_size, 32)
    text = role.lower(batch).as_text(debug_info=True)
    for name in ("layer", "attention", "mlp", "head", "optimizer"):
        assert f"/{name}/" in text or f"({name})/" in text, name
