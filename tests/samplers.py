"""Samplers over a tiny model, placed in different ways."""

import jax
import numpy as np
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, param_specs
from jaxtrain.rl.placement import build_sampler, sampling_meshes, trainer_devices
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.rl.sync import rollout_model
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.roles.role import Snapshot
from jaxtrain.sample.requests import SamplingParams

SIZES = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1], "hidden_size": 32, "intermediate_size": 32}
PROMPTS = [Prompt(number, np.arange(1, 4 + number, dtype=np.int32), {"prompt": "?"}) for number in range(3)]


def spec(trainer):
    return WorkerSpec(trainer, SamplingParams(max_tokens=6), seed=3, slots=8, max_length=32)


def trained(mesh, lora=None, seed=0):
    """A trainer and its parameters, split over `mesh`."""
    model = tiny.model(lora, mesh, **SIZES)
    params = tiny.random_params(model, seed)
    return model, jax.device_put(params, param_specs(model.axes(), params, RULES["fsdp"], mesh))


def place(placement, seed=0, lora=None):
    mesh, sampling = meshes(placement)
    model, params = trained(mesh, lora, seed)
    return build_sampler(placement, spec(rollout_model(model, sampling)), model, Snapshot(params, 0)), model, params


def meshes(placement):
    """The meshes for training and for sampling."""
    mesh = make_mesh(MeshSection(), trainer_devices(placement))
    return mesh, next(iter(sampling_meshes(placement, MeshSection(), mesh)), None)


def same(one, other):
    for a, b in zip((t for g in one for t in g), (t for g in other for t in g), strict=True):
        assert a.completion_ids.tolist() == b.completion_ids.tolist()
        np.testing.assert_allclose(a.sampler_logps, b.sampler_logps, atol=2e-6)


COLOCATED, DISJOINT = PlacementSection(), PlacementSection(kind="disjoint", rollout_devices=4)
