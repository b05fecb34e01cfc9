"""Sources with a scripted sampler, without a model."""

import threading
import time
from typing import ClassVar

import pytest

from jaxtrain.rl.collect import Collected
from jaxtrain.rl.sample_sources import OnPolicySource, PrefetchingSource
from jaxtrain.train.preemption import Interrupted


class World:
    """A sampler and a collect function that record the versions at the start and end of a rollout."""

    def __init__(self, rollouts=10):
        self.version, self.made, self.rollouts = None, 0, rollouts
        self.may_finish = threading.Semaphore(0)
        self.began = []

    def set_params(self, params, version):
        self.version = version

    def collect(self):
        if self.made == self.rollouts:
            return None
        self.began.append(self.version)
        self.may_finish.acquire()
        self.made += 1
        return Collected([], {"rollout": self.made, "ended": self.version}, 1)

    def state(self):
        return self.made


def wait_until(condition):
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_on_policy_samples_use_the_current_weights():
    world = World(rollouts=2)
    source = OnPolicySource(world.collect, world, world.state)
    for number in (0, 1):
        world.may_finish.release()
        collected = source({}, number)
        assert world.began[-1] == number and collected.metrics["rollout"] == number + 1
        assert source.state() == number + 1 and collected.metrics["time/sync"] >= 0
    assert source({}, 2) is None


def test_an_interrupted_rollout_does_not_change_the_state():
    world = World()
    drawn = iter([1, 2, 3])
    taken = [0]

    def collect():
        taken[0] = next(drawn)  # prompts are drawn before anything is sampled
        if taken[0] == 2:
            raise Interrupted
        return Collected([], {}, 1)

    source = OnPolicySource(collect, world, lambda: taken[0])
    assert source.state() == 0
    source({}, 0)
    with pytest.raises(Interrupted):
        source({}, 1)
    assert source.state() == 1


def test_a_thread_that_is_interrupted_wakes_the_trainer():
    world = World()

    def collect():
        if world.began:
            raise Interrupted
        return world.collect()

    source = PrefetchingSource(collect, world, world.state, staleness=1, updates=1)
    world.may_finish.release()
    source({}, 0)
    with pytest.raises(Interrupted):
        source({}, 1)
    assert source.state() == 1
    source.close()


@pytest.mark.parametrize(("staleness", "updates"), [(1, 1), (2, 1), (3, 1), (2, 2), (5, 2)])
def test_prefetching_starts_rollouts_as_early_as_staleness_allows(staleness, updates):
    world = World()
    source = PrefetchingSource(world.collect, world, world.state, staleness=staleness, updates=updates)
    lead = staleness // updates
    for rollout in range(4):
        number = 10 + rollout * updates
        for _ in range(lead + 1):
            world.may_finish.release()
        collected = source({}, number)
        assert collected.metrics["rollout"] == rollout + 1 and source.state() == rollout + 1
        # While the trainer holds rollout k, rollouts up to k + lead are made, and the next one waits.
        assert wait_until(lambda most=rollout + 1 + lead: world.made == most)
        time.sleep(0.05)
        assert len(world.began) == rollout + 1 + lead
    for rollout, version in enumerate(world.began):
        assert 10 + rollout * updates - version <= staleness
    source.close()
    assert len(world.began) == 4 + lead


def test_weights_reach_a_running_rollout():
    world = World()
    source = PrefetchingSource(world.collect, world, world.state, staleness=1, updates=1)
    world.may_finish.release()
    source({}, 0)
    assert wait_until(lambda: world.began == [0, 0])
    threading.Timer(0.1, world.may_finish.release).start()
    assert source({}, 1).metrics["ended"] == 1
    world.may_finish.release()
    source.close()


def test_the_end_of_the_prompts_and_errors_reach_the_trainer():
    world = World(rollouts=1)
    source = PrefetchingSource(world.collect, world, world.state, staleness=1, updates=1)
    world.may_finish.release()
    assert source({}, 0) is not None and source({}, 1) is None
    source.close()

    class Broken(World):
        error: ClassVar = ValueError("no such prompt")

        def collect(self):
            raise self.error

    world = Broken()
    source = PrefetchingSource(world.collect, world, world.state, staleness=1, updates=1)
    with pytest.raises(ValueError, match="no such prompt"):
        source({}, 0)
    source.close()


def test_a_staleness_below_the_updates_of_a_rollout_is_an_error():
    world = World()
    with pytest.raises(ValueError, match="samples are used for 4 optimizer steps"):
        PrefetchingSource(world.collect, world, world.state, staleness=3, updates=4)
