"""Weights travel to other processes unchanged, and no host has more than a chunk of them at a time."""

import os
import pickle
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_ray
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samplers
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import engine_mesh, make_mesh
from jaxtrain.rl import ray_sampler
from jaxtrain.rl.ray_sampler import RaySampler, RayWorker
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.rl.weight_chunks import chunk_weights, place_chunks
from jaxtrain.sample.capacity import serving_shardings

LIMIT = 700  # bytes: of several parameters, a part of one, or of a row
OF_READER = 2 * LIMIT  # JAX frees an array of the host that was copied to a device at its next call


class Alive:
    """Counts the bytes of chunks that something still refers to, of which there should be no more than `limit`.

    A thread of the runtime gives up an array of the host after what was computed from it is ready, and JAX frees it at
    a call after that. So chunks above the limit have some seconds, with calls, in which they can be freed.
    """

    def __init__(self, limit):
        self.bytes = self.most = self.total = 0
        self.limit = limit

    def watch(self, chunk):
        size, end = sum(piece.values.nbytes for piece in chunk), time.monotonic() + 10
        while self.bytes + size > self.limit and time.monotonic() < end:
            jax.device_put(np.zeros(1)).block_until_ready()
        for piece in chunk:
            self.bytes += piece.values.nbytes
            self.total += piece.values.nbytes
            weakref.finalize(piece.values, self._freed, piece.values.nbytes)
        self.most = max(self.most, self.bytes)
        return chunk

    def _freed(self, size):
        self.bytes -= size


@pytest.mark.parametrize("tensor", [None, 2], ids=["one device", "split"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_arrive_with_every_bit_and_chunk_by_chunk(dtype, tensor):
    model = tiny.model(tiny.LORA, make_mesh(MeshSection()), **samplers.SIZES)
    model = replace(model, run=replace(model.run, dtype=jnp.dtype(dtype)))
    params = samplers.trained(model.run.mesh, tiny.LORA)[1]
    section = MeshSection(preset="fsdp_tensor", tensor=tensor or 1)
    rollout = rollout_model(model, tensor and engine_mesh(section, jax.devices()[:4]))
    expected = WeightSync(model, rollout_model(model, model.run.mesh))(params)
    weights, alive = chunk_weights(model, params, LIMIT), Alive(OF_READER)
    assert weights.bytes == expected.bytes
    placed = place_chunks(rollout, weights._replace(chunks=map(alive.watch, weights.chunks)))
    jax.tree.map(np.testing.assert_array_equal, placed, expected.params)
    assert alive.most <= OF_READER < weights.bytes / 15 and alive.total >= weights.bytes
    if tensor:
        assert jax.tree.map(lambda leaf: leaf.sharding, placed) == serving_shardings(rollout)


def test_neither_the_trainer_nor_a_worker_has_more_than_a_chunk(monkeypatch):
    """Ray's memory is not theirs: here it has bytes."""
    sending, receiving = Alive(LIMIT), Alive(OF_READER)
    ray = fake_ray.FakeRay()
    monkeypatch.setattr(ray, "put", lambda chunk: pickle.dumps(sending.watch(chunk)), raising=False)
    monkeypatch.setattr(ray_sampler, "connect_ray", lambda: ray)
    monkeypatch.setattr(ray_sampler, "chunk_weights", partial(chunk_weights, limit=LIMIT))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda chunk: receiving.watch(pickle.loads(chunk))))
    trainer = tiny.model(**samplers.SIZES)
    sampler = RaySampler(samplers.spec(trainer), trainer, workers=1, seconds=60.0)
    for version in (0, 1):
        sampler.set_params(tiny.random_params(trainer, seed=version), version)
    assert isinstance(sampler._workers[0].handle._made, RayWorker)
    assert sampler.metrics()["sync/bytes"] == chunk_weights(trainer, tiny.random_params(trainer)).bytes
    for alive in (sending, receiving):
        assert 0 < alive.most <= alive.limit and alive.total >= 2 * sampler.metrics()["sync/bytes"]


OF_TWO_PROCESSES = f"""
import sys
import time
from pathlib import Path
import jax
import numpy as np
import samplers
import tiny
from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.weight_chunks import chunk_weights, place_chunks

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
alone = tiny.model(**samplers.SIZES)
expected = tiny.random_params(alone, 0)
Path(sys.argv[3], sys.argv[2]).touch()  # in their first collective they wait for each other for 30 seconds only
while len(list(Path(sys.argv[3]).iterdir())) < 2:
    time.sleep(0.02)
model, params = samplers.trained(make_mesh(MeshSection()))
assert not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
found = place_chunks(alone, chunk_weights(model, params, {LIMIT}))
jax.tree.map(np.testing.assert_array_equal, found, expected)
print("equal")
"""


def test_each_of_two_processes_that_hold_shards_sends_all(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    command = [sys.executable, "-c", OF_TWO_PROCESSES, address]
    processes = [
        subprocess.Popen([*command, str(number), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    assert [process.communicate(timeout=300)[0].splitlines()[-1:] for process in processes] == [["equal"]] * 2
