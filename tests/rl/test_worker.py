"""A sampler that was sent to another process samples what one in this process does."""

import pickle

import jax
import samplers
import tiny

from jaxtrain.rl.sync import WeightSync, from_host, rollout_model, to_host
from jaxtrain.rl.worker import WorkerSpec
from jaxtrain.sample.requests import SamplingParams


def test_a_pickled_specification_builds_the_same_sampler():
    trainer = tiny.model(**samplers.SIZES)
    params = tiny.random_params(trainer)
    spec = samplers.spec(rollout_model(trainer, None))
    sync = WeightSync(trainer, spec.model)
    here = spec.build(sync(params).params, 5, sync)
    sent = pickle.loads(pickle.dumps((spec, jax.tree.map(jax.device_get, to_host(trainer, params).params))))
    there = sent[0].build(from_host(sent[0].model, sent[1]), 5, sync)
    expected = here.sample(samplers.PROMPTS, 3)
    samplers.same(there.sample(samplers.PROMPTS, 3), expected)
    assert {int(version) for group in expected for t in group for version in t.versions} == {5}


def test_a_specification_is_its_fields():
    model = tiny.model(**samplers.SIZES)
    one, other = (WorkerSpec(model, SamplingParams(max_tokens=6), seed, 8, 32) for seed in (3, 4))
    assert one == samplers.spec(model) != other
