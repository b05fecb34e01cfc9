import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.rl.advantages import group_normalised
from jaxtrain.rl.algorithms import Algorithm
from jaxtrain.rl.collect import Collector, Limits, rollout_metrics
from jaxtrain.rl.rollouts import Prompt


class Prompts:
    def __init__(self, most=10**6):
        self.number, self.most = 0, most

    def draw(self, count):
        taken = [
            Prompt(n, np.arange(3, dtype=np.int32), {}) for n in range(self.number, min(self.number + count, self.most))
        ]
        self.number += len(taken)
        return taken


class FakeSampler:
    """Group `n` has as many right answers as `rights(n)` says."""

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
        limits=Limits(10),
    )
    return made(), sampler


def test_groups_that_teach_nothing_are_replaced_by_as_many_others():
    result, sampler = collect(lambda n: (0, 2, 4, 1)[n % 4], max_refills=3)
    assert sampler.calls == [[0, 1, 2, 3], [4, 5], [6], [7]]
    assert [t.prompt.number for t in result.trajectories[::4]] == [1, 3, 5, 7]
    assert result.prompts == 8


def test_refills_are_bounded_and_a_step_of_nothing_keeps_its_last_round():
    result, sampler = collect(lambda n: 4, max_refills=2)
    assert [len(call) for call in sampler.calls] == [4, 4, 4]
    assert len(result.trajectories) == 16
    assert result.metrics["frac_reward_zero_std"] == 1
    assert result.metrics["dynamic_sampling/dropped_groups"] == 12


def test_without_dynamic_sampling_every_group_is_kept():
    result, sampler = collect(lambda n: 4)
    assert len(sampler.calls) == 1 and len(result.trajectories) == 16
    assert "dynamic_sampling/rounds" not in result.metrics


def test_dry_prompts_end_the_run_after_a_smaller_step():
    prompts = Prompts(most=6)
    sizes = [len(collect(lambda n: 1, prompts)[0].trajectories) for _ in range(2)]
    assert sizes == [16, 8]
    assert collect(lambda n: 1, prompts)[0] is None


def test_overlong_samples_are_punished_and_filtered():
    changes = {"length": 9, "finish_reason": "length"}
    result, _ = collect(lambda n: 2, changes=changes, overlong_cache=0.4, overlong_filter=True)
    first = result.trajectories[0]
    assert first.rewards["overlong"] == pytest.approx(-3 / 4)
    assert first.reward == pytest.approx(1 - 3 / 4)
    assert not any(t.loss_mask.any() for t in result.trajectories)


def test_metrics_are_trls():
    """Against its definitions: reward_std is the mean over the groups of their unbiased std."""
    rewards = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, float("nan"), 1.0]]
    trajectories = [
        trajectory(length=3 + i + j, number=i, sample=j, reward=r, finish_reason="length" if j == 2 else "stop")
        for i, group in enumerate(rewards)
        for j, r in enumerate(group)
    ]
    metrics = rollout_metrics(trajectories)
    known = [r for group in rewards for r in group if not np.isnan(r)]
    assert metrics["reward"] == pytest.approx(np.mean(known))
    assert metrics["reward_std"] == pytest.approx(np.mean([np.std([1, 0, 0], ddof=1), 0, np.std([0, 1], ddof=1)]))
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["rewards/right/mean"] == pytest.approx(np.mean(known))
    assert metrics["completions/max_length"] == 7 and metrics["completions/max_terminated_length"] == 6
    assert metrics["completions/clipped_ratio"] == pytest.approx(1 / 3)
