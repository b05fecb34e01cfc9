import math
from pathlib import Path

import numpy as np
from trajectories import trajectory

from jaxtrain.config.rollouts import RewardSection
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.rl.scoring import RewardScorer, conversation_metrics

HERE = Path(__file__).parent / "reward_functions.py"


def score(trajectories, *rewards, environment_weight=1.0):
    sections = [RewardSection(function=f"{HERE}:{name}", weight=weight) for name, weight in rewards]
    with RewardPool(sections, workers=1) as pool:
        scorer = RewardScorer(sections, pool, environment_weight)
        return scorer([t._replace(rewards=t.rewards) for t in trajectories]), scorer.metrics()


def sample(text, columns=None, **changes):
    made = trajectory(**{"reward": math.nan, "text": text, "rewards": {}, **changes})
    return made._replace(prompt=made.prompt._replace(columns={"prompt": "?", **(columns or {})}))


def test_the_reward_is_the_weighted_sum_of_the_parts_that_apply():
    scored, metrics = score([sample("a"), sample("bb")], ("length", 2.0), ("only_even", 10.0))
    assert [t.reward for t in scored] == [2.0, 14.0]
    assert scored[1].rewards == {"length": 2.0, "only_even": 1.0} and math.isnan(scored[0].rewards["only_even"])
    assert metrics == {"rewards/lost": 0.0} and scored[0].timings["reward"] > 0


def test_a_sample_is_lost_to_a_failure_an_error_or_where_nothing_applies():
    trajectories = [sample("bad"), sample("bb"), sample("ccc"), sample("dd", info={"error": "it broke"})]
    scored, metrics = score(trajectories, ("only_even", 1.0), ("not_a_number", 0.0))
    assert [math.isnan(t.reward) for t in scored] == [True, False, False, True]
    assert metrics == {"rewards/lost": 2.0, "rewards/not_a_number/not_finite": 1.0}
    scored, metrics = score([sample("a")], ("only_even", 1.0))
    assert math.isnan(scored[0].reward) and metrics == {"rewards/lost": 1.0}


def test_an_environments_part_is_weighted_like_any_other():
    played = sample("bb", rewards={"environment": 3.0}, token_rewards=np.array([0, 1, 0, 2], np.float32))
    ((scored,), _) = score([played], ("length", 1.0), environment_weight=0.5)
    assert scored.reward == 3.5 and scored.token_rewards.tolist() == [0, 0.5, 0, 1]
    assert [t.reward for t in score([played])[0]] == [3.0]


def test_functions_get_messages_for_conversations_own_ids_and_the_rows_columns():
    mask = np.array([True, False, True, True])
    one = sample("bb", {"answer": 5}, loss_mask=mask)
    ((scored,), _) = score([one], ("columns_seen", 1.0))
    assert scored.reward == 3 + 5  # three tokens of its own
    talk = [{"role": "user", "content": "?"}]
    scored, _ = score([one, sample("cc", {"answer": 7, "prompt": talk})], ("kinds", 1.0))
    assert [t.reward for t in scored] == [1.0, 2.0]


def test_metrics_of_conversations():
    infos = [{"turns": 2, "tool_calls": 3, "tool_failures": 1}, {"turns": 1, "tool_calls": 1, "tool_failures": 1}]
    infos.append(infos[0] | {"error": "x", "timed_out": True})
    metrics = conversation_metrics([sample("", info=info) for info in infos])
    assert metrics == {
        "environment/turns": 5 / 3,
        "environment/errors": 1.0,
        "environment/timeouts": 1.0,
        "tools/call_frequency": 7 / 3,
        "tools/failure_frequency": 3 / 7,
    }
    assert conversation_metrics([sample("")]) == {}
