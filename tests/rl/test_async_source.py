"""Groups ahead of the trainer: a scripted sampler that finishes them in any order, without a model."""

import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.rl.advantages import group_normalised
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.async_source import AsyncSource, GroupQueue
from jaxtrain.rl.collect import Collector, LengthLimits, ScoredGroup
from jaxtrain.rl.rollouts import Prompt
from jaxtrain.train.preemption import Interrupted

SAMPLES = 2


class Prompts:
    """A stream like `PromptStream`: of the numbers below `last`."""

    def __init__(self, last=10**6, state=None):
        self.last, self.number, self.used = last, 0, set()
        if state is not None:
            self.number, self.used = state["prompts"]["number"], set(state["prompts"]["used"])

    def draw(self, count):
        drawn = []
        while len(drawn) < count and self.number < self.last:
            if self.number not in self.used:
                drawn.append(Prompt(self.number, np.arange(3, dtype=np.int32), {}))
            self.number += 1
        return drawn

    def get_state(self):
        return {"prompts": {"number": self.number, "used": sorted(n for n in self.used if n >= self.number)}}


def queue(stream, processes=1, process=0, **settings):
    return GroupQueue(
        lambda: next(iter(stream.draw(1)), None),
        stream.get_state,
        lambda number: number % processes == process,
        **{"prompts": 4, "max_lag": 2, "refills": 0} | settings,
    )


def scored(number, useful=True):
    return ScoredGroup([trajectory(number=number, sample=sample) for sample in range(SAMPLES)], useful)


def numbers(groups):
    return [group.prompt.number for group in groups]


@pytest.mark.parametrize(("processes", "max_lag", "seed"), [(1, 1, 0), (1, 3, 1), (3, 2, 2)])
def test_batches_are_full_and_no_group_is_older_than_max_lag(processes, max_lag, seed):
    """Groups are finished in a random order, and one in ten takes very long."""
    choose, last = random.Random(seed), 83
    for process in range(processes):
        groups, begun, trained, batch = queue(Prompts(last), processes, process, max_lag=max_lag), {}, [], -1
        while True:
            batch += 1
            groups.next_batch()
            for number in numbers_of(groups.start()):
                begun[number] = batch, choose.random() * 10 if choose.random() < 0.1 else choose.random()
            while (taken := groups.next_part()) is None:
                number = min((n for n in begun if begun[n][1] is not None), key=lambda n: begun[n][1])
                begun[number] = begun[number][0], None
                groups.finish(scored(number))
            owned = [n for n in range(4 * batch, min(4 * batch + 4, last)) if n % processes == process]
            assert len(taken.members) == len(owned)
            assert all(batch - begun[number][0] <= max_lag for number in numbers(taken.members))
            assert numbers(taken.members) == sorted(numbers(taken.members))
            if 4 * batch >= last:
                break
            trained += numbers(taken.members)
        assert sorted(trained) == [number for number in range(last) if number % processes == process]
        assert trained != sorted(trained)


def numbers_of(prompts):
    return [prompt.number for prompt in prompts]


def test_a_batch_waits_only_for_a_group_that_would_become_too_old():
    groups = queue(Prompts(), max_lag=1)
    groups.next_batch()
    assert numbers_of(groups.start()) == list(range(8))
    for number in (7, 2, 5, 3):
        assert groups.next_part() is None
        groups.finish(scored(number))
    assert numbers(groups.next_part().members) == [2, 3, 5, 7]
    groups.next_batch()
    assert numbers_of(groups.start()) == [8, 9, 10, 11]
    for number in (8, 9, 10, 11, 0, 1, 4):
        groups.finish(scored(number))
        assert groups.next_part() is None  # number 6 was begun a batch ago
    groups.finish(scored(6))
    assert numbers(groups.next_part().members) == [0, 1, 4, 6]


def test_a_group_is_overtaken_while_it_is_new_enough():
    groups = queue(Prompts(), max_lag=4)
    for batch, first in enumerate((0, 12, 16, 20)):
        groups.next_batch()
        groups.start()
        for number in range(first, first + (12 if batch == 0 else 4)):
            if number:
                groups.finish(scored(number))
        assert 0 not in numbers(groups.next_part().members)
    groups.next_batch()
    groups.start()
    assert groups.next_part() is None
    groups.finish(scored(0))
    assert numbers(groups.next_part().members)[0] == 0


def test_the_state_draws_again_what_is_in_no_batch_yet():
    stream = Prompts(20)
    groups = queue(stream, max_lag=1)
    groups.next_batch()
    groups.start()
    for number in (0, 3, 4, 7):
        groups.finish(scored(number))
    taken = groups.next_part()
    assert taken.state["prompts"]["number"] == 1 and taken.used == [0, 3, 4, 7]
    rest = Prompts(20, {"prompts": {**taken.state["prompts"], "used": taken.used}})
    assert numbers_of(rest.draw(99)) == [1, 2, 5, 6, *range(8, 20)]


def test_useless_groups_are_replaced_as_often_as_refills_permit():
    groups = queue(Prompts(), max_lag=1, refills=1)
    groups.next_batch()
    groups.start()
    for number in range(3):
        groups.finish(scored(number, useful=False))
    assert numbers_of(groups.start()) == [8, 9, 10]
    for number in (3, 8):
        groups.finish(scored(number, useful=False))
    assert numbers_of(groups.start()) == [11]  # a fifth one is not replaced
    for number in (4, 5, 6, 7):
        groups.finish(scored(number))
    taken = groups.next_part()
    assert numbers(taken.members) == [4, 5, 6, 7] and numbers(taken.replaced) == [0, 1, 2, 3]


class Sampler:
    """Finishes a prompt when the test says so; its tokens are tagged with the newest version."""

    def __init__(self):
        self.version, self.begun, self.may_finish = None, {}, {}
        self.others_want, self.streams = False, 0

    def set_params(self, params, version):
        self.version = version

    def wanted(self):
        return self.others_want

    def stream(self, feed, samples):
        self.streams += 1
        more = True
        while more or self.begun.keys() - self.may_finish.keys():
            prompts = next(feed, None)
            more = prompts is not None
            for prompt in prompts or ():
                self.begun[prompt.number] = self.version
            for number in [n for n, done in self.may_finish.items() if n in self.begun and not done]:
                self.may_finish[number] = True
                for sample in range(samples):
                    versions = np.full(4, self.begun[number], np.int32)
                    yield trajectory(number=number, sample=sample, versions=versions)
            time.sleep(0.001)

    def finish(self, *which):
        self.may_finish.update(dict.fromkeys(which, False))


def source_of(sampler, prompts, scorer=list, *, staleness=2, updates=1, scorers=1, **algorithm):
    collect = Collector(
        prompts.draw,
        sampler,
        scorer,
        Algorithm(group_normalised, **algorithm),
        prompts=2,
        samples=SAMPLES,
        limits=LengthLimits(10),
    )
    return AsyncSource(collect, prompts, staleness=staleness, updates=updates, scorers=scorers)


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def trained(collected):
    return [t.prompt.number for t in collected.trajectories[::SAMPLES]]


def test_training_gets_what_is_finished_and_sampling_never_pauses():
    sampler = Sampler()
    source = source_of(sampler, Prompts())
    sampler.finish(1, 3)
    first = source({}, 10)
    assert trained(first) == [1, 3] and {int(t.versions[0]) for t in first.trajectories} == {10}
    assert sorted(sampler.begun) == list(range(4))  # of the batches of steps 10 and 11
    assert source.state() == {"prompts": {"number": 0, "used": [1, 3]}}
    sampler.finish(5, 4)
    second = source({}, 11)  # these are begun while 0 and 2 are still sampled
    assert trained(second) == [4, 5] and sampler.streams == 1
    assert {int(t.versions[0]) for t in second.trajectories} == {11} and second.metrics["time/wait"] > 0
    third, results = threading.Thread(target=lambda: results.append(source({}, 12))), []
    sampler.finish(6, 7, 0)
    third.start()
    time.sleep(0.1)
    assert not results  # step 12 is the last one for which the samples of step 10 are new enough, and needs number 2
    sampler.finish(2)
    third.join()
    assert trained(results[0]) == [0, 2]
    source.close()


def test_another_call_of_the_sampler_ends_the_stream_and_a_new_one_goes_on():
    sampler = Sampler()
    source = source_of(sampler, Prompts())
    sampler.finish(*range(8))
    source({}, 0)
    sampler.others_want = True
    assert wait_until(lambda: sampler.streams > 1)
    sampler.others_want = False
    assert [trained(source({}, 1)), trained(source({}, 2))] == [[2, 3], [4, 5]]
    source.close()


@pytest.mark.parametrize("last", [4, 5])
def test_the_end_of_the_prompts_gives_a_smaller_batch_and_then_none(last):
    sampler = Sampler()
    source = source_of(sampler, Prompts(last))
    sampler.finish(*range(last))
    assert [trained(source({}, step)) for step in range((last + 1) // 2)] == [[0, 1], [2, 3], [4]][: (last + 1) // 2]
    assert source({}, 3) is None
    source.close()


def test_groups_without_a_signal_are_replaced_and_their_prompts_are_not_repeated():
    def rewards(trajectories):
        return [t._replace(reward=float(t.prompt.number % 3 == 0 and t.sample)) for t in trajectories]

    sampler, stream = Sampler(), Prompts()
    source = source_of(sampler, stream, rewards, max_refills=10)
    sampler.finish(*range(100))
    batches = [source({}, step) for step in range(3)]
    assert [trained(batch) for batch in batches] == [[0, 3], [6, 9], [12, 15]]
    state = source.state()["prompts"]
    source.close()
    left = numbers_of(Prompts(40, {"prompts": state}).draw(99))
    assert left[0] > 15 and all(batch.metrics["dynamic_sampling/dropped_groups"] > 0 for batch in batches)


@pytest.mark.parametrize("scorers", [1, 2])
def test_a_slow_reward_delays_no_group_that_another_thread_can_score(scorers):
    begun, judged = threading.Event(), threading.Event()

    def judge(trajectories):
        if any(t.prompt.number == 0 for t in trajectories):
            begun.set()
            judged.wait()
        return list(trajectories)

    sampler = Sampler()
    source = source_of(sampler, Prompts(), judge, scorers=scorers)
    batch, results = threading.Thread(target=lambda: results.append(source({}, 0))), []
    batch.start()
    sampler.finish(0)
    assert begun.wait(20)
    sampler.finish(1, 2)
    batch.join(0.3 if scorers == 1 else 20)
    assert [trained(each) for each in results] == ([] if scorers == 1 else [[1, 2]])
    judged.set()
    batch.join()
    source.close()


def test_errors_and_interruptions_of_the_threads_reach_the_trainer():
    def fails(trajectories):
        raise ValueError("no such reward")

    for scorer, error in ((fails, ValueError), (None, Interrupted)):
        sampler = Sampler()
        if scorer is None:
            sampler.wanted = interrupted
        source = source_of(sampler, Prompts(), scorer or list)
        sampler.finish(0, 1)
        with pytest.raises(error):
            source({}, 0)
            source({}, 1)
        source.close()


def interrupted():
    raise Interrupted


def test_a_staleness_below_the_updates_of_a_batch_is_an_error():
    collect = SimpleNamespace()
    with pytest.raises(ValueError, match="samples are used for 4 optimizer steps"):
        AsyncSource(collect, Prompts(), staleness=3, updates=4)
