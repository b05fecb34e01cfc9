"""Weights that travel to a sampler are the trainer's, merged and cast, in buffers of their own."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samplers
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.nn.decoder import Execution
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.sync import WeightSync, from_host, rollout_model, to_host

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_way_over_the_host_keeps_every_bit(dtype):
    trainer = tiny.model(**samplers.SIZES)
    params = tiny.random_params(trainer)
    run = Execution(jnp.dtype(dtype), "none", "auto", None)
    rollout = trainer.__class__(trainer.config, None, run)
    sent = to_host(rollout, params)
    assert all(leaf.dtype in (np.float32, np.uint16) for leaf in jax.tree.leaves(sent.params))  # numpy's own
    direct = WeightSync(rollout, rollout)(params).params
    jax.tree.map(np.testing.assert_array_equal, from_host(rollout, sent.params), direct)


OF_TWO_PROCESSES = """
import sys
from dataclasses import replace
import jax
import numpy as np
import samplers
import tiny
from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl import sync

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sync._PIECE_BYTES = 600  # several pieces of a parameter, of which the last is smaller
model, params = samplers.trained(make_mesh(MeshSection()))
assert not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
alone = replace(model, run=replace(model.run, mesh=None))
expected = sync.to_host(alone, tiny.random_params(alone, 0))
found = sync.to_host(model, params)
jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
assert found.bytes == expected.bytes
print("equal")
"""


def test_two_processes_that_hold_shards_have_the_whole_model_on_their_hosts():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", OF_TWO_PROCESSES, address]
    processes = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    assert [process.communicate(timeout=300)[0].splitlines()[-1:] for process in processes] == [["equal"]] * 2
