"""KTO equals the formulas of its papers on packed rows, however they are packed and split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_pairs import packed, sigmoid

from jaxtrain.objectives.kto import KTO
from jaxtrain.train.step import batch_norm
from jaxtrain.types import MISMATCHED, Scores

GOOD = [1, 0, 1, 0, 0]  # of the five bundles


def labelled(rows):
    """Bundles of an answer and one to another prompt; `answers` has (logp, ref) of both, by bundle."""
    batch, logp, answers = packed(rows)
    order = [pair for row in rows for pair in row]
    label = np.zeros(batch.tokens.shape, np.float32)
    number = 0
    for row in range(len(label)):
        for bundle in range(1, batch.bundle_ids[row].max() + 1):
            at = batch.bundle_ids[row] == bundle
            label[row][at] = np.where(batch.signals["sign"][row][at] == 1, GOOD[order[number]], MISMATCHED)
            number += 1
    signals = {"label": label, "ref_logps": batch.signals["ref_logps"]}
    return (
        batch._replace(signals=signals),
        logp,
        [(GOOD[pair], *sides) for pair, sides in zip(order, answers, strict=True)],
    )


def loss(objective, batch, logp):
    zeros = np.zeros_like(logp)
    scores = Scores(logp=logp, entropy=zeros, correct=zeros)
    batch = batch._replace(signals={**batch.signals, **objective.prepare(lambda *_: scores, batch)})
    return lambda values: objective(scores._replace(logp=values), batch, batch_norm(batch))


def expected(objective, answers):
    beta, weights = objective.beta, (objective.undesirable_weight, objective.desirable_weight)
    ratio = np.array([own[0].sum() - own[1].sum() for _, own, _ in answers])
    good = np.array([label for label, *_ in answers])
    z = max(0, np.mean([other[0].sum() - other[1].sum() for *_, other in answers])) if objective.loss == "kto" else 0
    value = np.where(good, 1 - sigmoid(beta * (ratio - z)), 1 - sigmoid(beta * (z - ratio)))
    return np.mean(np.where(good, weights[1], weights[0]) * value), z, beta * ratio, good


@pytest.mark.parametrize("loss_name", ["kto", "apo_zero"])
@pytest.mark.parametrize(
    "rows", [[[0, 1], [2, 3], [4]], [[0], [1], [2], [3], [4]], [[4, 3], [2, 1], [0], []]], ids=range(3)
)
def test_loss_and_metrics(loss_name, rows):
    objective = KTO(loss=loss_name, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    batch, logp, answers = labelled(rows)
    value, metrics = loss(objective, batch, logp)(logp)
    wanted, z, rewards, good = expected(objective, answers)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert float(metrics["rewards/chosen"].value) == pytest.approx(rewards[good == 1].mean(), rel=1e-4)
    margin = rewards[good == 1].mean() - rewards[good == 0].mean()
    assert float(metrics["rewards/margins"].value) == pytest.approx(margin, rel=1e-4)
    if loss_name == "kto":
        assert float(metrics["kl"].value) == pytest.approx(z, rel=1e-5)


def test_the_gradient_is_that_of_the_loss_with_z_fixed():
    objective = KTO(beta=0.2)
    batch, logp, _ = labelled([[0, 1], [2, 3], [4]])
    of = loss(objective, batch, logp)
    grad = np.array(jax.grad(lambda values: of(values)[0])(jnp.asarray(logp)))
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        direction = rng.normal(size=logp.shape)
        step = 1e-4
        ahead, behind = (float(of(np.float64(logp) + sign * step * direction)[0]) for sign in (1, -1))
    assert (grad * direction).sum() == pytest.approx((ahead - behind) / (2 * step), rel=1e-3)
    assert not grad[batch.signals["label"] == MISMATCHED].any()


def test_microbatches_add_up():
    objective = KTO()
    batch, logp, _ = labelled([[0, 1], [2, 3], [4], []])
    zeros = np.zeros_like(logp)
    scores = Scores(logp=logp, entropy=zeros, correct=zeros)
    whole = batch._replace(signals={**batch.signals, **objective.prepare(lambda *_: scores, batch)})
    norm = batch_norm(whole)
    value, metrics = objective(scores, whole, norm)
    parts = [
        objective(Scores(*(x[at] for x in (logp, zeros, zeros))), whole.map(lambda x, at=at: x[at]), norm)
        for at in (slice(0, 2), slice(2, 4))
    ]
    assert float(value) == pytest.approx(sum(float(part) for part, _ in parts), rel=1e-5)
    for name, metric in metrics.items():
        total = sum(part[name].total for _, part in parts) / sum(part[name].weight for _, part in parts)
        assert float(metric.value) == pytest.approx(float(total), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("fields", [{"beta": 0}, {"desirable_weight": -1}])
def test_wrong_numbers_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        KTO(**fields)
