"""Preference losses equal the papers' formulas, written with numpy, and their gradients numerical ones."""

import dataclasses

import jax
import numpy as np
import pytest
from preference_pairs import packed, sigmoid

from jaxtrain.objectives.preference import CPO, DPO, ORPO, SimPO
from jaxtrain.train.step import add_signals, batch_norm, split_rows
from jaxtrain.types import Scores


def loss_of(objective, batch, logp, norm=None):
    batch = add_signals(objective, lambda *needs: None, batch)
    ones = np.ones(batch.tokens.shape, np.float32)
    scores = Scores(logp=logp, entropy=ones, correct=ones)
    return objective(scores, batch, norm or batch_norm(batch))


def nll(answers):
    return -np.concatenate([chosen for (chosen, _), _ in answers]).mean()


def dpo_by_hand(kind, answers, beta, eps):
    losses = []
    for (chosen, ref_chosen), (rejected, ref_rejected) in answers:
        c, r = chosen.sum() - ref_chosen.sum(), rejected.sum() - ref_rejected.sum()
        x, by_token = beta * (c - r), c / len(chosen) - r / len(rejected)
        losses.append(
            {
                "sigmoid": -(1 - eps) * np.log(sigmoid(x)) - eps * np.log(sigmoid(-x)),
                "hinge": max(0, 1 - x),
                "ipo": (by_token - 1 / (2 * beta)) ** 2,
                "robust": (-(1 - eps) * np.log(sigmoid(x)) + eps * np.log(sigmoid(-x))) / (1 - 2 * eps),
                "sigmoid_norm": -np.log(sigmoid(beta * by_token)),
                "apo_zero": 1 - sigmoid(beta * c) + sigmoid(beta * r),
                "apo_down": sigmoid(beta * c) + 1 - sigmoid(x),
            }[kind]
        )
    return np.mean(losses)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero", "apo_down"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_dpo_losses(kind, eps):
    if eps and kind not in ("sigmoid", "robust"):
        with pytest.raises(ValueError, match=r"label_smoothing=0\.1 has no effect"):
            DPO(loss=kind, label_smoothing=eps)
        return
    batch, logp, answers = packed([[0, 1], [2, 3], [4]])
    objective = DPO(beta=0.3, loss=kind, label_smoothing=eps)
    value, metrics = loss_of(objective, batch, logp)
    assert float(value) == pytest.approx(dpo_by_hand(kind, answers, 0.3, eps), rel=1e-5)
    assert float(metrics["loss"].value) == pytest.approx(float(value), rel=1e-6)
    margins = [0.3 * (c.sum() - rc.sum() - r.sum() + rr.sum()) for (c, rc), (r, rr) in answers]
    assert float(metrics["rewards/margins"].value) == pytest.approx(np.mean(margins), rel=1e-4)
    assert float(metrics["rewards/accuracies"].value) == pytest.approx(np.mean(np.array(margins) > 0))
    assert float(metrics["logps/chosen"].value) == pytest.approx(np.mean([c.sum() for (c, _), _ in answers]), rel=1e-5)


def test_a_mapping_adds_weighted_losses():
    batch, logp, answers = packed([[0, 1], [2, 3], [4]])
    objective = DPO(loss={"sigmoid": 0.8, "apo_zero": 0.5, "sft": 0.25})
    expected = sum(w * dpo_by_hand(kind, answers, 0.1, 0) for kind, w in (("sigmoid", 0.8), ("apo_zero", 0.5)))
    assert float(loss_of(objective, batch, logp)[0]) == pytest.approx(expected + 0.25 * nll(answers), rel=1e-5)


def test_losses_without_a_reference():
    batch, logp, answers = packed([[0, 1], [2, 3], [4]])
    batch = batch._replace(signals={"sign": batch.signals["sign"]})
    sums = [(c.sum(), r.sum()) for (c, _), (r, _) in answers]
    means = [(c.mean(), r.mean()) for (c, _), (r, _) in answers]
    simpo = np.mean([-np.log(sigmoid(2 * (c - r) - 0.7)) for c, r in means])
    assert float(loss_of(SimPO(gamma=0.7), batch, logp)[0]) == pytest.approx(simpo, rel=1e-5)
    cpo = np.mean([-np.log(sigmoid(0.1 * (c - r))) for c, r in sums]) + 0.5 * nll(answers)
    assert float(loss_of(CPO(alpha=0.5), batch, logp)[0]) == pytest.approx(cpo, rel=1e-5)
    odds = [np.log(np.exp(c) / (1 - np.exp(c))) - np.log(np.exp(r) / (1 - np.exp(r))) for c, r in means]
    orpo = nll(answers) - 0.2 * np.mean(np.log(sigmoid(np.array(odds))))
    assert float(loss_of(ORPO(beta=0.2), batch, logp)[0]) == pytest.approx(orpo, rel=1e-5)


OBJECTIVES = [
    *(DPO(loss=kind) for kind in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero", "apo_down", "sft")),
    DPO(label_smoothing=0.2),
    DPO(loss={"sigmoid": 1.0, "sft": 0.5}),
    SimPO(),
    CPO(label_smoothing=0.1),
    ORPO(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_are_those_of_differences(objective):
    batch, logp, _ = packed([[0, 1], [2, 3]])
    with jax.enable_x64(True):
        logp = logp.astype(np.float64)
        gradient = jax.grad(lambda x: loss_of(objective, batch, x)[0])(logp)
        step = np.random.default_rng(1).normal(size=logp.shape) * (batch.loss_weights > 0) * 1e-4
        up, down = (float(loss_of(objective, batch, logp + sign * step)[0]) for sign in (1, -1))
        assert float((gradient * step).sum() * 2) == pytest.approx(up - down, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_packed_pairs_have_the_loss_of_pairs_alone_and_microbatches_that_of_a_batch(objective):
    batch, logp, _ = packed([[0, 1], [2, 3]])
    whole = float(loss_of(objective, batch, logp)[0])
    alone, alone_logp, _ = packed([[0], [1], [2], [3]])
    assert float(loss_of(objective, alone, alone_logp)[0]) == pytest.approx(whole, rel=1e-5)

    norm, prepared = batch_norm(alone), add_signals(objective, lambda *needs: None, alone)
    pieces = split_rows(prepared._replace(signals={**prepared.signals, "logp": alone_logp}), 2, None)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], pieces) for i in range(2)]
    plain = dataclasses.replace(objective)
    values = [
        plain(Scores(p.signals["logp"], np.ones_like(p.signals["logp"]), np.ones_like(p.signals["logp"])), p, norm)[0]
        for p in parts
    ]
    assert float(sum(values)) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "fault"),
    [(lambda: DPO(beta=0), "beta=0 must be more than 0"), (lambda: DPO(label_smoothing=0.5), "label_smoothing=0.5")],
)
def test_numbers_that_cannot_be_used_are_refused(make, fault):
    with pytest.raises(ValueError, match=fault):
        make()


def test_a_batch_without_a_reference_is_refused():
    batch, logp, _ = packed([[0]])
    batch = batch._replace(signals={"sign": batch.signals["sign"]})
    with pytest.raises(ValueError, match="DPO needs the signal 'ref_logps', and the batch has sign"):
        loss_of(DPO(), batch, logp)
