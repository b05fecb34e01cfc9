import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.objectives.value import ClippedValue
from jaxtrain.rl.rollouts import pack
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores


def test_value_loss_is_the_clipped_one():
    trajectories = [trajectory(2, n, sample=i) for i, n in enumerate([3, 7, 5, 1, 6, 4])]
    trajectories[1] = trajectories[1]._replace(loss_mask=np.array([1, 1, 0, 0, 1, 1, 1], bool))
    batch = pack(trajectories, 24, rows=2).batch
    rng = np.random.default_rng(1)
    old, values, returns = rng.normal(size=(3, *batch.tokens.shape)).astype(np.float32)
    batch = batch._replace(signals={"values": old, "returns": returns})
    own = batch.loss_weights > 0
    v, o, r = (x[own].astype(np.float64) for x in (values, old, returns))
    expected = np.mean(0.5 * np.maximum((v - r) ** 2, (np.clip(v, o - 0.2, o + 0.2) - r) ** 2))
    value, metrics = ClippedValue(0.2)(Scores(value=values), batch, batch_norm(batch))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert 0 < float(metrics["value_clip_ratio"].value) < 1
