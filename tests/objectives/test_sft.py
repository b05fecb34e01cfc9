import numpy as np
import tiny

from jaxtrain.objectives.sft import SFT
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores


def scores_of(batch):
    rng = np.random.default_rng(0)
    logp, entropy, uniform = (rng.random(batch.tokens.shape).astype(np.float32) for _ in range(3))
    return Scores(logp=-logp, entropy=entropy, correct=(uniform > 0.5).astype(np.float32))


def test_loss_and_metrics_are_means_over_the_weighted_tokens():
    batch = tiny.packed_batch([[9, 3], [12]], 16)
    scores, weights = scores_of(batch), np.asarray(batch.loss_weights)
    loss, metrics = SFT()(scores, batch, batch_norm(batch))
    expected = {"loss": -scores.logp, "mean_token_accuracy": scores.correct, "entropy": scores.entropy}
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name].value, np.average(values, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["loss"].value, rtol=1e-5)


def test_losses_of_microbatches_add_up():
    batch = tiny.packed_batch([[9, 3], [12], [4, 4], [1]], 16)
    scores, norm = scores_of(batch), batch_norm(batch)
    whole, _ = SFT()(scores, batch, norm)
    parts = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = Scores(*(None if score is None else score[rows] for score in scores))
        parts += SFT()(part, batch.map(lambda column, rows=rows: column[rows]), norm)[0]
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_small_weights_are_normalised_like_large_ones():
    batch = tiny.packed_batch([[9, 3], [12]], 16)
    small = batch._replace(loss_weights=batch.loss_weights * np.float32(1e-4))
    scores = scores_of(batch)
    losses = [SFT()(scores, each, batch_norm(each))[0] for each in (batch, small)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_batch_of_padding_has_no_loss():
    batch = tiny.packed_batch([[]], 8)
    loss, metrics = SFT()(scores_of(batch), batch, batch_norm(batch))
    assert loss == 0 and metrics["loss"].value == 0
