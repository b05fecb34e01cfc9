"""Sources with a scripted sampler, without a model."""

import pytest

from jaxtrain.rl.collect import Collected
from jaxtrain.rl.sample_sources import OnPolicySource
from jaxtrain.train.preemption import Interrupted


class World:
    """A sampler and a collect function that record the versions at the start of a rollout."""

    def __init__(self, rollouts=10):
        self.version, self.made, self.rollouts, self.began = None, 0, rollouts, []

    def set_params(self, params, version):
        self.version = version

    def collect(self):
        if self.made == self.rollouts:
            return None
        self.began.append(self.version)
        self.made += 1
        return Collected([], {"rollout": self.made}, 1)

    def state(self):
        return self.made


def test_on_policy_samples_use_the_current_weights():
    world = World(rollouts=2)
    source = OnPolicySource(world.collect, world, world.state)
    for number in (0, 1):
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
