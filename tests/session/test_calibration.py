"""The calibration error equals its definition."""

import numpy as np
from preference_pairs import packed, sigmoid

from jaxtrain.session.calibration import BINS, bin_sums


def by_hand(logits, right):
    confidence = sigmoid(np.abs(logits))
    bins = ((confidence - 0.5) * 2 * BINS).astype(int).clip(0, BINS - 1)
    return sum(abs(confidence[bins == b].sum() - right[bins == b].sum()) for b in range(BINS)) / len(logits)


def error(rewards, batch):
    confidence, right, count = np.array(bin_sums(rewards, batch))
    return abs(confidence - right).sum() / count.sum()


def ends(batch):
    following = np.pad(batch.segment_ids[:, 1:], ((0, 0), (0, 1)))
    return (batch.segment_ids > 0) & (batch.segment_ids != following)


def test_of_pairs():
    batch, *_ = packed([[0, 1], [2, 3], [4]])
    batch = batch._replace(loss_weights=ends(batch).astype(np.float32))
    rewards = np.random.default_rng(0).normal(size=batch.tokens.shape).astype(np.float32) * 2
    logits = []
    for row in range(len(rewards)):
        for number in range(1, batch.bundle_ids[row].max() + 1):
            chosen, rejected = rewards[row][(batch.bundle_ids[row] == number) & (batch.loss_weights[row] > 0)]
            logits.append(chosen - rejected)
    logits = np.array(logits)
    np.testing.assert_allclose(error(rewards, batch), by_hand(logits, logits > 0), rtol=1e-5)


def test_of_labels():
    batch, *_ = packed([[0, 1], [2, 3], [4]])
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, batch.tokens.shape).astype(np.float32)
    scored = ends(batch)
    batch = batch._replace(loss_weights=scored.astype(np.float32), signals={"label": labels})
    rewards = rng.normal(size=batch.tokens.shape).astype(np.float32) * 2
    logits = rewards[scored]
    np.testing.assert_allclose(
        error(rewards, batch), by_hand(logits, (logits > 0) == (labels[scored] > 0.5)), rtol=1e-5
    )
