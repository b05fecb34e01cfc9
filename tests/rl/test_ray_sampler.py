"""Workers in other processes; skipped without Ray."""

import importlib.util
import os
import signal
import time
from pathlib import Path

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


def test_finished_samples_of_a_lost_worker_are_kept(sampler, monkeypatch):
    ids, take, kept = sampler.process_ids(), sampler._take, {}

    def take_and_kill(share):
        arrived, end = take(share)
        if not kept and (first := {t.sample: t for t in arrived if t.prompt.number == 0}):
            kept.update(first)
            os.kill(ids[0], signal.SIGKILL)
        return arrived, end

    monkeypatch.setattr(sampler, "_take", take_and_kill)
    expected = place(COLOCATED, seed=5)[0].sample(PROMPTS, 150)
    groups = sampler.sample(PROMPTS, 150)
    same(groups, expected)
    assert kept and all(groups[0][sample] is trajectory for sample, trajectory in kept.items())
    assert sampler.metrics()["rollout/lost_workers"] == 1


def in_use(sampler):
    """The process ids, once replaced workers have started."""
    while any(worker.start is not None for worker in sampler._workers):
        sampler._check_starts()
    sampler.sample(PROMPTS, 3)  # all is compiled
    return sampler.process_ids()


def test_a_new_worker_may_compile_for_longer_than_its_limit_for_a_sample(sampler, monkeypatch):
    ids, first, take = in_use(sampler), [], sampler._take

    def note(share):
        arrived, end = take(share)
        if arrived and not first:
            first.append(time.monotonic())
            monkeypatch.setattr(sampler, "_seconds", 120.0)  # sampling itself is not what is timed
        return arrived, end

    for pid in ids:
        os.kill(pid, signal.SIGKILL)
    colocated, model, _ = place(COLOCATED, seed=5)
    sampler.set_params(trained(model.run.mesh, seed=5)[1], 7)  # notices it
    while any(worker.start is not None for worker in sampler._workers):
        sampler._check_starts()
    sampler.metrics()
    monkeypatch.setattr(sampler, "_take", note)
    limit, start = 0.7, time.monotonic()  # tracing alone takes longer, also where compiled programs are cached
    monkeypatch.setattr(sampler, "_seconds", limit)
    same(sampler.sample(PROMPTS, 3), colocated.sample(PROMPTS, 3))
    assert first[0] - start > limit and sampler.metrics()["rollout/slow_workers"] == 0


@pytest.mark.parametrize("receiving", [True, False], ids=["weights", "sampling"])
def test_a_stopped_worker_is_replaced_in_time(sampler, caplog, monkeypatch, receiving):
    ids = in_use(sampler)
    colocated, model, _ = place(COLOCATED, seed=6)
    expected, params = colocated.sample(PROMPTS, 3), trained(model.run.mesh, seed=6)[1]
    monkeypatch.setattr(sampler, "_seconds", 10.0)
    os.kill(ids[0], signal.SIGSTOP)
    start = time.monotonic()
    if receiving:
        sampler.set_params(params, 8)
        assert time.monotonic() - start < 30
    same(sampler.sample(PROMPTS, 3), expected)
    assert sampler.metrics()["rollout/slow_workers"] == 1 and "rollout worker 0 is too slow" in caplog.text
    monkeypatch.undo()  # the new worker has compiled nothing yet
    after = in_use(sampler)
    assert after[0] != ids[0] and after[1] == ids[1]
    assert sampler.metrics() == sampler.metrics() | {"rollout/lost_workers": 0, "rollout/slow_workers": 0}
    while Path(f"/proc/{ids[0]}").exists():  # it does not keep its device
        assert time.monotonic() - start < 60
        time.sleep(0.1)
