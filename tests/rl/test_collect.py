from dataclasses import replace

import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.rl.advantages import group_normalised
from jaxtrain.rl.algorithms import ALGORITHMS, Algorithm
from jaxtrain.rl.collect import Collector, LengthLimits, check_generations, rollout_metrics
from jaxtrain.rl.failures import MAX_LOST_STEPS
from jaxtrain.rl.rollouts import Prompt


class Prompts:
    def __init__(self, last=10**6):
        self.number, self.last = 0, last

    def draw(self, count):
        taken = [
            Prompt(n, np.arange(3, dtype=np.int32), {}) for n in range(self.number, min(self.number + count, self.last))
        ]
        self.number += len(taken)
        return taken


class FakeSampler:
    """Group `n` has `rights(n)` correct answers."""

    def __init__(self, rights, **changes):
        self.rights, self.changes, self.calls = rights, changes, []

    def sample(self, prompts, samples):
        self.calls.append([prompt.number for prompt in prompts])
        return [
            [
                trajectory(number=p.number, sample=i, reward=float(i < self.rights(p.number)), **self.changes)
                for i in range(samples)
            ]
            for p in prompts
        ]


def collect(rights, prompts=None, *, changes=None, **algorithm):
    sampler = FakeSampler(rights, **(changes or {}))
    made = Collector(
        (prompts or Prompts()).draw,
        sampler,
        list,
        Algorithm(group_normalised, **algorithm),
        prompts=4,
        samples=4,
        limits=LengthLimits(10),
    )
    return made(), sampler


def test_groups_with_equal_rewards_are_replaced():
    result, sampler = collect(lambda n: (0, 2, 4, 1)[n % 4], max_refills=3)
    assert sampler.calls == [[0, 1, 2, 3], [4, 5], [6], [7]]
    assert [t.prompt.number for t in result.trajectories[::4]] == [1, 3, 5, 7]
    assert result.prompts == 8


def test_refills_are_limited_and_a_step_without_groups_keeps_its_last_round():
    result, sampler = collect(lambda n: 4, max_refills=2)
    assert [len(call) for call in sampler.calls] == [4, 4, 4]
    assert len(result.trajectories) == 16
    assert result.metrics["frac_reward_zero_std"] == 1
    assert result.metrics["dynamic_sampling/dropped_groups"] == 12


def test_without_dynamic_sampling_every_group_is_kept():
    result, sampler = collect(lambda n: 4)
    assert len(sampler.calls) == 1 and len(result.trajectories) == 16
    assert "dynamic_sampling/rounds" not in result.metrics


def test_exhausted_prompts_end_the_run_after_a_smaller_step():
    prompts = Prompts(last=6)
    sizes = [len(collect(lambda n: 1, prompts)[0].trajectories) for _ in range(2)]
    assert sizes == [16, 8]
    assert collect(lambda n: 1, prompts)[0] is None


def test_overlong_samples_are_penalised_and_filtered():
    changes = {"length": 9, "finish_reason": "length"}
    result, _ = collect(lambda n: 2, changes=changes, overlong_cache=0.4, overlong_filter=True)
    first = result.trajectories[0]
    assert first.rewards["overlong"] == pytest.approx(-3 / 4)
    assert first.reward == pytest.approx(1 - 3 / 4)
    assert all(t.left_out and t.loss_mask.all() for t in result.trajectories)


class Lengths:
    """A sampler for one prompt whose samples have these lengths and equal rewards."""

    def __init__(self, lengths, reward, **changes):
        self.lengths, self.reward, self.changes = lengths, reward, changes

    def sample(self, prompts, samples):
        return [
            [
                trajectory(number=p.number, sample=i, length=length, reward=self.reward, **self.changes)
                for i, length in enumerate(self.lengths)
            ]
            for p in prompts
        ]


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_dynamic_sampling_compares_rewards_before_the_overlong_penalty(reward):
    sampler = Lengths([10, 30, 44, 46], reward)
    options = {"prompts": 1, "samples": 4, "limits": LengthLimits(48)}
    result = Collector(Prompts().draw, sampler, list, ALGORITHMS["dapo"], **options)()
    assert result.metrics["dynamic_sampling/dropped_groups"] == 4
    assert [round(t.reward - reward, 2) for t in result.trajectories] == [0, 0, -0.6, -0.8]
    assert all(t.left_out for t in result.trajectories)


def test_conversations_have_overlong_penalties_by_their_limits():
    """Turns of 20 tokens, with 5 of the environment in between. Limits: 48 tokens per turn, four turns."""
    masks = [np.tile([True] * 20 + [False] * 5, turns)[:-5] for turns in (1, 2, 3, 4)]

    def punished(limits):
        class Turns:
            def sample(self, prompts, samples):
                return [
                    [
                        trajectory(number=0, sample=i, length=len(m), reward=1.0, loss_mask=m)
                        for i, m in enumerate(masks)
                    ]
                ]

        algorithm = Algorithm(group_normalised, overlong_cache=0.2)
        made = Collector(Prompts().draw, Turns(), list, algorithm, prompts=1, samples=4, limits=limits)
        return [t.rewards["overlong"] for t in made().trajectories]

    assert punished(LengthLimits(4 * 48, 200)) == [0, 0, 0, 0]
    assert punished(LengthLimits(4 * 48, 103)) == [
        0,
        0,
        0,
        pytest.approx(-15 / 20),
    ]  # 95 of 100 after the prompt
    assert punished(LengthLimits(4 * 20, 200)) == [0, 0, 0, -1]  # the model's own tokens in all turns
    assert punished(LengthLimits(48)) == [0, pytest.approx(-0.2), -1, -1]  # what the limit of one turn would do


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_reward_that_is_not_finite_is_lost_and_never_reaches_the_advantages(value):
    class Scorer:
        def __call__(self, trajectories):
            return [t._replace(reward=value if t.sample == 0 else float(t.sample)) for t in trajectories]

    options = {"prompts": 2, "samples": 4, "limits": LengthLimits(10)}
    sampler = FakeSampler(lambda n: 2)
    result = Collector(Prompts().draw, sampler, Scorer(), Algorithm(group_normalised), **options)()
    lost = [t for t in result.trajectories if t.sample == 0]
    assert all(np.isnan(t.reward) and t.left_out and t.info["lost_reward"] for t in lost)
    assert not any(t.left_out for t in result.trajectories if t.sample)
    assert result.metrics["rewards/lost_fraction"] == 0.25 and result.metrics["reward"] == 2


def test_rollouts_whose_rewards_are_all_lost_end_the_run():
    class Loses:
        def __call__(self, trajectories):
            info = {"lost_reward": "mine: KeyError: 'answer'"}
            return [t._replace(reward=np.nan, info=info) for t in trajectories]

    options = {"prompts": 2, "samples": 4, "limits": LengthLimits(10)}
    made = Collector(Prompts().draw, FakeSampler(lambda n: 2), Loses(), Algorithm(group_normalised), **options)
    for _ in range(MAX_LOST_STEPS - 1):
        metrics = made().metrics
        assert metrics["rewards/no_signal"] == metrics["rewards/lost_fraction"] == 1
    with pytest.raises(ValueError, match="mine: KeyError: 'answer'"):
        made()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_single_sample_of_a_prompt_is_refused_where_advantages_need_others(name):
    check_generations(ALGORITHMS[name], 2)
    if name in ("reinforce++", "ppo", "gkd", "gold", "uld"):
        check_generations(ALGORITHMS[name], 1)
        with pytest.raises(ValueError, match=r"rl\.algorithm\.max_refills=1"):
            check_generations(replace(ALGORITHMS[name], max_refills=1), 1)
    else:
        with pytest.raises(ValueError, match=r"rl\.generations=1: advantages are relative"):
            check_generations(ALGORITHMS[name], 1)


def test_exhausted_prompts_are_reported_once(caplog):
    prompts = Prompts(last=6)
    made = Collector(
        prompts.draw,
        FakeSampler(lambda n: 1),
        list,
        Algorithm(group_normalised),
        prompts=4,
        samples=4,
        limits=LengthLimits(10),
    )
    made()
    assert not caplog.records
    assert len(made().trajectories) == 8 and made() is None
    assert len(caplog.records) == 1 and "the prompts are exhausted" in caplog.text


def test_metrics_are_trls():
    """reward_std is the unbiased std of all rewards; frac_reward_zero_std counts samples."""
    rewards = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, float("nan"), 1.0]]
    trajectories = [
        trajectory(length=3 + i + j, number=i, sample=j, reward=r, finish_reason="length" if j == 2 else "stop")
        for i, group in enumerate(rewards)
        for j, r in enumerate(group)
    ]
    metrics = rollout_metrics(trajectories)
    known = [r for group in rewards for r in group if not np.isnan(r)]
    assert metrics["reward"] == pytest.approx(np.mean(known))
    assert metrics["reward_std"] == pytest.approx(np.std(known, ddof=1))
    assert metrics["frac_reward_zero_std"] == pytest.approx(3 / 9)
    alone = [trajectory(sample=0, reward=1.0), trajectory(sample=1, reward=np.nan)]  # a std needs two
    assert rollout_metrics(alone)["frac_reward_zero_std"] == 0
    assert metrics["rewards/right/mean"] == pytest.approx(np.mean(known))
    assert metrics["completions/max_length"] == 7 and metrics["completions/max_terminated_length"] == 6
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
