import math

import pytest
from trajectories import trajectory

from jaxtrain.rl.failures import MAX_LOST_STEPS, FailureLog, LostRewardGuard


def lost(number, sample, reason="mine: KeyError: 'answer'"):
    return trajectory(number=number, sample=sample, reward=math.nan, info={"lost_reward": reason})


def test_a_kind_of_failure_is_logged_when_it_first_occurs(caplog):
    failures = FailureLog()
    failures.report(["mine: KeyError: 'a'", "mine: KeyError: 'b'", "mine: ValueError: c"], 8)
    assert len(caplog.records) == 2
    assert "2 of 8 samples" in caplog.records[0].getMessage() and "mine: KeyError: 'a'" in caplog.text
    failures.report(["mine: KeyError: 'd'"] * 8, 8)
    assert len(caplog.records) == 2
    failures.report(["other: KeyError: 'd'"], 8)
    assert len(caplog.records) == 3


def test_rollouts_in_a_row_without_a_reward_end_the_run_with_the_reason(caplog):
    guard = LostRewardGuard(samples_needed=1)
    rollout = [lost(0, 0), lost(0, 1), lost(1, 0, "judge: timeout: took too long")]
    for number in range(1, MAX_LOST_STEPS):
        assert guard.check(rollout)
        assert f"{number} of the {MAX_LOST_STEPS} in a row" in caplog.text
    with pytest.raises(
        ValueError, match=rf"{MAX_LOST_STEPS} consecutive rollouts .* mine: KeyError: 'answer' \(2 samples\); judge"
    ):
        guard.check(rollout)


def test_a_usable_reward_resets_the_count():
    guard = LostRewardGuard(samples_needed=1)
    for _ in range(3):
        for _ in range(MAX_LOST_STEPS - 1):
            assert guard.check([lost(0, 0), lost(0, 1)])
        assert not guard.check([lost(0, 0), trajectory(number=0, sample=1, reward=0.0)])


def test_a_single_reward_in_a_group_is_not_usable_for_relative_advantages():
    rollout = [lost(0, 0), trajectory(number=0, sample=1, reward=1.0)]
    assert LostRewardGuard(samples_needed=2).check(rollout)
    assert not LostRewardGuard(samples_needed=1).check(rollout)
    assert not LostRewardGuard(samples_needed=2).check([trajectory(number=0, reward=1.0)])  # nothing is lost
