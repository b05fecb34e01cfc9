"""Workers in other processes; skipped without Ray."""

import importlib.util
import os
import signal

import pytest
import ray_start
from samplers import COLOCATED, PROMPTS, place, same, trained

from jaxtrain.config.rl_parts import PlacementSection

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    ray_start.start(tmp_path_factory.mktemp("ray"))
    made, _, _ = place(PlacementSection(kind="ray", workers=2, worker_seconds=120.0))
    yield made
    made.close()


def test_workers_sample_the_same_as_one_process_even_if_one_is_killed(sampler, caplog):
    colocated, model, _ = place(COLOCATED)
    expected = colocated.sample(PROMPTS, 3)
    same(sampler.sample(PROMPTS, 3), expected)
    assert sampler.metrics()["rollout/lost_workers"] == 0
    assert sampler.metrics()["sync/bytes"] > 0

    before = sampler.process_ids()
    os.kill(before[1], signal.SIGKILL)
    same(sampler.sample(PROMPTS, 3), expected)
    assert sampler.metrics()["rollout/lost_workers"] == 1 and "rollout worker 1 is lost" in caplog.text

    other = trained(model.run.mesh, seed=5)[1]
    sampler.set_params(other, 7)
    colocated.set_params(other, 7)
    moved = sampler.sample(PROMPTS, 3)
    same(moved, colocated.sample(PROMPTS, 3))
    assert (moved[0][0].versions == 7).all()
    after = sampler.process_ids()
    assert after[0] == before[0] and after[1] != before[1]


def test_a_slow_workers_prompts_go_to_another(sampler, caplog):
    before = sampler.process_ids()
    sampler.sample(PROMPTS, 3)  # all is compiled
    os.kill(before[0], signal.SIGSTOP)
    sampler._seconds = 3.0
    groups = sampler.sample(PROMPTS, 3)
    assert [len(group) for group in groups] == [3, 3, 3]
    assert sampler.metrics()["rollout/slow_workers"] == 1 and "rollout worker 0 is too slow" in caplog.text
