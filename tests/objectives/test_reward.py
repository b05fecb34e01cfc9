"""Losses of reward models equal their formulas on packed rows."""

import numpy as np
import pytest
from preference_pairs import packed, sigmoid

from jaxtrain.objectives.reward import BradleyTerry, PointwiseReward
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores


@pytest.fixture
def case():
    """A packed batch, rewards of all tokens, and those of the last tokens by pair."""
    batch, _, _ = packed([[0, 1], [2, 3], [4]])
    ends = (batch.segment_ids > 0) & (batch.segment_ids != np.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1))))
    batch = batch._replace(loss_weights=ends.astype(np.float32))
    rewards = np.random.default_rng(3).normal(size=batch.tokens.shape).astype(np.float32)
    pairs = []
    for row in range(len(rewards)):
        for number in range(1, batch.bundle_ids[row].max() + 1):
            sides = [
                np.flatnonzero((batch.bundle_ids[row] == number) & (batch.signals["sign"][row] == s)) for s in (1, -1)
            ]
            pairs.append([rewards[row, side[-1]] for side in sides])
    return batch, rewards, np.array(pairs, np.float64)


def test_bradley_terry(case):
    batch, rewards, pairs = case
    value, metrics = BradleyTerry()(Scores(reward=rewards), batch, batch_norm(batch))
    difference = pairs[:, 0] - pairs[:, 1]
    assert float(value) == pytest.approx(np.mean(-np.log(sigmoid(difference))), rel=1e-5)
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean(difference > 0))
    assert float(metrics["margin"].value) == pytest.approx(difference.mean(), rel=1e-5)
    assert float(metrics["min_reward"].value) == pytest.approx(pairs.min())
    assert float(metrics["max_reward"].value) == pytest.approx(pairs.max())
    assert float(metrics["mean_reward"].value) == pytest.approx(pairs.mean(), rel=1e-5)


def test_margins_and_centred_rewards(case):
    batch, rewards, pairs = case
    batch = batch._replace(signals={**batch.signals, "margin": np.full(batch.tokens.shape, 0.4, np.float32)})
    value, _ = BradleyTerry(center=0.01)(Scores(reward=rewards), batch, batch_norm(batch))
    expected = -np.log(sigmoid(pairs[:, 0] - pairs[:, 1] - 0.4)) + 0.01 * pairs.sum(1) ** 2
    assert float(value) == pytest.approx(expected.mean(), rel=1e-5)


def test_pointwise(case):
    batch, rewards, _ = case
    labels = np.random.default_rng(4).integers(0, 2, batch.tokens.shape).astype(np.float32)
    batch = batch._replace(signals={"label": labels})
    last = batch.loss_weights > 0
    assert last.sum() == 10
    r, y = rewards[last].astype(np.float64), labels[last]
    value, _ = PointwiseReward()(Scores(reward=rewards), batch, batch_norm(batch))
    assert float(value) == pytest.approx(np.mean((r - y) ** 2), rel=1e-5)
    value, metrics = PointwiseReward(kind="binary")(Scores(reward=rewards), batch, batch_norm(batch))
    expected = -y * np.log(sigmoid(r)) - (1 - y) * np.log(sigmoid(-r))
    assert float(value) == pytest.approx(expected.mean(), rel=1e-5)
    assert float(metrics["accuracy"].value) == pytest.approx(np.mean((r > 0) == (y > 0.5)))
