"""A sampler that was sent to another process samples what one in this process does."""

import pickle
from dataclasses import replace
from functools import partial

import jax
import samplers
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import AXES
from jaxtrain.rl.sync import WeightSync, rollout_model
from jaxtrain.rl.weight_chunks import chunk_weights, place_chunks
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.sample.requests import SamplingParams


def test_a_pickled_specification_builds_the_same_sampler():
    trainer = tiny.model(**samplers.SIZES)
    params = tiny.random_params(trainer)
    spec = samplers.spec(rollout_model(trainer, None))
    sync = WeightSync(trainer, spec.model)
    here = spec.build(sync(params).params, 5, sync)
    weights = chunk_weights(trainer, params)
    spec, weights = pickle.loads(pickle.dumps((spec, weights._replace(chunks=list(weights.chunks)))))
    there = spec.build(place_chunks(spec.model, weights), 5, sync)
    expected = here.sample(samplers.PROMPTS, 3)
    samplers.same(there.sample(samplers.PROMPTS, 3), expected)
    assert {int(version) for group in expected for t in group for version in t.versions} == {5}


def test_a_specification_is_its_fields():
    model = tiny.model(**samplers.SIZES)
    one, other = (WorkerSpec(model, SamplingParams(max_tokens=6), seed, 8, 32) for seed in (3, 4))
    assert one == samplers.spec(model) != other


def test_a_worker_splits_its_model_over_the_devices_that_it_is_given():
    trainer = tiny.model(**samplers.SIZES)
    params = tiny.random_params(trainer)
    spec = replace(samplers.spec(trainer), mesh=MeshSection(preset="fsdp_tensor", tensor=2))
    one, many = (spec.on_devices(jax.devices()[:count]) for count in (1, 4))
    assert one.model.run.mesh is None and dict(many.model.run.mesh.shape) == {
        **dict.fromkeys(AXES, 1),
        "fsdp": 2,
        "tensor": 2,
    }
    found = []
    for each in (one, many):
        receive = partial(place_chunks, each.model)
        sampler = each.build(receive(chunk_weights(trainer, params)), 0, receive)
        found.append(sampler.sample(samplers.PROMPTS, 3))
    samplers.same(*found)
