import math
from pathlib import Path

import numpy as np
from trajectories import trajectory

from jaxtrain.config.rl_parts import RewardSection
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


def test_a_reward_is_lost_by_a_failure_an_error_or_if_no_part_applies():
    trajectories = [sample("bad"), sample("bb"), sample("ccc"), sample("dd", info={"error": "it broke"})]
    scored, metrics = score(trajectories, ("only_even", 1.0), ("not_a_number", 0.0))
    assert [math.isnan(t.reward) for t in scored] == [True, False, False, True]
    assert metrics == {"rewards/lost": 2.0, "rewards/not_a_number/not_finite": 1.0}
    scored, metrics = score([sample("a")], ("only_even", 1.0))
    assert math.isnan(scored[0].reward) and metrics == {"rewards/lost": 1.0}


def test_lost_samples_have_a_reason_and_each_kind_is_logged_once_with_its_count(caplog):
    sections = [RewardSection(function=f"{HERE}:{name}") for name in ("raises_always", "returns_none")]
    trajectories = [sample("a"), sample("b"), sample("c", info={"error": "KeyError: 'number'", "turns": 1})]
    with RewardPool(sections[:1], workers=1) as pool:
        scorer = RewardScorer(sections[:1], pool)
        for _ in range(3):
            scored = scorer(trajectories)
    assert [t.info["lost_reward"] for t in scored] == [
        *["raises_always: RuntimeError: no reward"] * 2,
        "environment: KeyError: 'number'",  # what happened first
    ]
    assert caplog.text.count("lost the reward") == 2 and "1 of 3 samples" in caplog.text
    assert "lost the reward of 3 of 3 samples" in caplog.text and "RuntimeError: no reward" in caplog.text
    caplog.clear()
    with RewardPool(sections[1:], workers=1) as pool:
        scored = RewardScorer(sections[1:], pool)(trajectories)
    assert "returns_none: TypeError: it must return a list of numbers" in scored[0].info["lost_reward"]
    scored, _ = score(trajectories, ("only_even", 1.0))
    assert scored[0].info["lost_reward"] == "only_even: None: no reward applies to the sample"
    assert scored[2].info["lost_reward"] == "environment: KeyError: 'number'"


def test_a_sum_that_is_not_finite_in_float32_is_lost():
    scored, metrics = score([sample("a"), sample("bb")], ("length", 3e38))
    assert scored[0].reward == 3e38 and math.isnan(scored[1].reward) and metrics["rewards/lost"] == 1
    assert scored[1].info["lost_reward"] == "length: not finite: the weighted sum is 6e+38"


def test_an_environments_part_is_weighted_like_any_other():
    played = sample("bb", rewards={"environment": 3.0}, token_rewards=np.array([0, 1, 0, 2], np.float32))
    ((scored,), _) = score([played], ("length", 1.0), environment_weight=0.5)
    assert scored.reward == 3.5 and scored.token_rewards.tolist() == [0, 0.5, 0, 1]
    assert [t.reward for t in score([played])[0]] == [3.0]


def test_functions_get_messages_token_ids_and_columns():
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


def test_what_functions_log_is_a_metric_by_its_name_and_extra_of_the_sample():
    versions = np.full(4, 5, np.int32)
    texts = ["a", "bb", "ccc"]
    sections = [RewardSection(function=f"{HERE}:{name}") for name in ("logs", "length")]
    with RewardPool(sections, workers=2) as pool:
        scorer = RewardScorer(sections, pool, max_steps=10)
        scored = scorer([sample(text, versions=versions) for text in texts])
        metrics = scorer.metrics()
        assert scorer.metrics() == {"rewards/lost": 0.0}  # of the samples since the last call
    assert metrics == {"mean_length": 2.0, "rewards/lost": 0.0}  # over samples, however calls divide them
    assert [t.rewards["logs"] for t in scored] == [0.5] * 3
    assert [t.info["extra"] for t in scored] == [{"logs/upper": text.upper()} for text in texts]
