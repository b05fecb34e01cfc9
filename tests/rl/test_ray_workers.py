"""Lost, stopped and slow workers of `RaySampler`, at chosen moments: threads instead of Ray's processes."""

import itertools
import random
import threading
import time
from collections import defaultdict
from queue import SimpleQueue
from typing import ClassVar

import fake_ray
import numpy as np
import pytest
import samplers
import tiny

from jaxtrain.rl import ray_sampler
from jaxtrain.rl.ray_sampler import RaySampler
from jaxtrain.rl.rollouts import Prompt, Trajectory
from jaxtrain.train.preemption import Interrupted

PROMPTS = [Prompt(number, np.arange(3, dtype=np.int32), {}) for number in range(6)]
SECONDS = 1.5  # long enough for a busy machine


class Scripted:
    """A worker that tags samples with its number and version. `script` is called before each sample and each start."""

    script = staticmethod(lambda worker, what: None)
    made: ClassVar[list["Scripted"]] = []

    def __init__(self, spec):
        self.number, self.version, self.sampled, self.lock = len(self.made), -1, [], threading.Lock()
        self.added = defaultdict(SimpleQueue)
        self.made.append(self)

    def set_params(self, weights, version):
        if self.version < 0:
            self.script(self, "start")
        with self.lock:
            self.version = max(version, self.version)

    def add(self, number, prompts):
        self.added[number].put(prompts)

    def stream(self, number, samples):
        assert self.version >= 0, "it samples without weights"
        while (prompts := self.added[number].get()) is not None:
            for prompt, sample in itertools.product(prompts, range(samples)):
                self.script(self, (prompt.number, sample))
                self.sampled.append((prompt.number, sample))
                yield trajectory(prompt, sample, self.number, self.version)


def trajectory(prompt, sample, worker, version):
    ids, one = np.zeros(1, np.int32), np.zeros(1, np.float32)
    versions = np.full(1, version, np.int32)
    return Trajectory(prompt, sample, ids, one == 0, one, one, versions, str(worker), "stop")


@pytest.fixture
def made(monkeypatch):
    """A sampler with two workers, and the weights that it has."""
    monkeypatch.setattr(ray_sampler, "connect_ray", fake_ray.FakeRay)
    monkeypatch.setattr(ray_sampler, "RayWorker", Scripted)
    monkeypatch.setattr(Scripted, "script", staticmethod(lambda worker, what: None))
    monkeypatch.setattr(Scripted, "made", [])
    trainer = tiny.model(**samplers.SIZES)
    sampler, params = (
        RaySampler(samplers.spec(trainer), trainer, workers=2, seconds=SECONDS),
        tiny.random_params(trainer),
    )
    sampler.set_params(params, 1)
    return sampler, params


def script(monkeypatch, called):
    monkeypatch.setattr(Scripted, "script", staticmethod(called))


def complete(groups, version):
    assert [[t.sample for t in group] for group in groups] == [[0, 1]] * len(PROMPTS)
    assert [group[0].prompt.number for group in groups] == list(range(len(PROMPTS)))
    assert {int(t.versions[0]) for group in groups for t in group} == {version}
    return [[int(t.text) for t in group] for group in groups]


def events(sampler):
    metrics = sampler.metrics()
    return metrics["rollout/lost_workers"], metrics["rollout/slow_workers"]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_finished_samples_of_a_worker_are_kept_and_the_rest_is_sampled_by_another(made, monkeypatch, how):
    sampler, _ = made
    starting = threading.Event()

    def lose(worker, what):
        if worker.number == 0 and what == (2, 1):
            time.sleep(0.05)  # what it has sampled has arrived
            getattr(sampler._workers[0].handle, how)()
        if what == "start":
            starting.wait()  # no new worker is needed

    script(monkeypatch, lose)
    workers = complete(sampler.sample(PROMPTS, 2), 1)
    starting.set()
    assert workers == [[0, 0], [1, 1], [0, 1], [1, 1], [1, 1], [1, 1]]
    assert events(sampler) == ((1, 0) if how == "kill" else (0, 1)) and events(sampler) == (0, 0)
    assert Scripted.made[1].sampled.count((0, 0)) == 0  # a complete group is not sampled again


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_worker_that_is_lost_while_it_receives_weights_is_replaced_in_time(made, monkeypatch, how):
    sampler, params = made
    getattr(sampler._workers[0].handle, how)()
    starting, begin = threading.Event(), time.monotonic()
    script(monkeypatch, lambda worker, what: what == "start" and starting.wait())
    sampler.set_params(params, 2)
    assert complete(sampler.sample(PROMPTS, 2), 2) == [[1, 1]] * 6
    assert time.monotonic() - begin < SECONDS + 5
    assert events(sampler) == ((1, 0) if how == "kill" else (0, 1))
    # It is in use once it has started, with weights that were set meanwhile.
    sampler.set_params(params, 3)
    starting.set()
    while sampler._workers[0].start is not None:
        sampler._check_starts()
    assert complete(sampler.sample(PROMPTS, 2), 3) == [[2, 2], [1, 1]] * 3


def test_all_workers_may_be_lost_at_once(made, monkeypatch):
    sampler, params = made
    for worker in sampler._workers:
        worker.handle.kill()
    sampler.set_params(params, 2)
    assert {worker for group in complete(sampler.sample(PROMPTS, 2), 2) for worker in group} <= {2, 3}
    assert events(sampler) == (2, 0)


def test_a_hundred_rollouts_survive_workers_killed_and_stopped_at_random(made, monkeypatch):
    sampler, params = made
    script(monkeypatch, lambda worker, what: time.sleep(0.001))
    chosen, hit, sent = random.Random(0), set(), []
    total = np.zeros(2)
    for version in range(2, 102):
        usable = [worker for worker in sampler._workers if worker.start is None and worker not in hit]
        if usable and chosen.random() < 0.25:
            worker, how = chosen.choice(usable), "kill" if len(sent) % 5 else "stop"
            hit.add(worker)
            sent.append(how)
            threading.Timer(0.02 * chosen.random(), getattr(worker.handle, how)).start()
        sampler.set_params(params, version)
        complete(sampler.sample(PROMPTS, 2), version)
        total += events(sampler)
    time.sleep(0.1)
    sampler.set_params(params, 102)  # notices the last ones
    complete(sampler.sample(PROMPTS, 2), 102)
    total += events(sampler)
    assert len(sent) > 10 and total[0] == sent.count("kill") and total[1] == sent.count("stop") > 1


def test_a_stream_goes_on_while_a_sample_is_slow_and_when_a_worker_is_lost(made, monkeypatch):
    sampler, _ = made
    slow, arrived = threading.Event(), []

    def wait(worker, what):
        if what == (0, 1):
            slow.wait()
        if what == (7, 0) and worker.number == 1:
            time.sleep(0.05)
            sampler._workers[1].handle.kill()

    script(monkeypatch, wait)

    def feed():
        for number in range(12):
            yield [Prompt(number, np.arange(3, dtype=np.int32), {})]
            if number in (5, 9):  # both must be finished while the sample is slow, by the other worker or a new one
                while (number, 1) not in arrived:
                    yield []
            if number == 9:
                slow.set()

    sampler._seconds = 60.0
    for t in sampler.stream(feed(), 2):
        arrived.append((t.prompt.number, t.sample))
    assert sorted(arrived) == [(number, sample) for number in range(12) for sample in range(2)]
    assert arrived.index((0, 1)) > arrived.index((9, 1)) and events(sampler) == (1, 0)


def test_a_prompt_that_no_worker_survives_ends_the_run_after_three(made, monkeypatch):
    sampler, _ = made

    def die(worker, what):
        if what == (2, 1):
            time.sleep(0.05)
            sampler._workers[[each.handle._made for each in sampler._workers].index(worker)].handle.kill()

    script(monkeypatch, die)
    with pytest.raises(RuntimeError, match="3 workers were lost with the same prompts"):
        sampler.sample(PROMPTS, 2)
    assert events(sampler)[0] >= 3


def test_a_worker_that_cannot_be_started_ends_the_run_after_three_attempts(made, monkeypatch):
    sampler, params = made

    def fail(worker, what):
        if what == "start":
            raise fake_ray.RayActorError

    script(monkeypatch, fail)
    for worker in sampler._workers:
        worker.handle.kill()
    sampler.set_params(params, 2)
    with pytest.raises(RuntimeError, match="rollout worker 0 could not be started in 3 attempts"):
        sampler.sample(PROMPTS, 2)


def test_an_error_of_a_worker_is_raised(made, monkeypatch):
    sampler, _ = made

    def fail(worker, what):
        raise ValueError("no such template")

    script(monkeypatch, fail)
    with pytest.raises(ValueError, match="no such template"):
        sampler.sample(PROMPTS, 2)


def test_an_interruption_ends_the_wait(made):
    sampler, params = made
    for worker in sampler._workers:
        worker.handle.stop()
    sampler._seconds = 60.0
    threading.Timer(0.2, sampler.interrupt).start()
    for call in (lambda: sampler.sample(PROMPTS, 2), lambda: sampler.set_params(params, 2)):
        with pytest.raises(Interrupted):
            call()
