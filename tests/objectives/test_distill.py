import numpy as np
import pytest
import tiny
from divergences import formula

from jaxtrain.objectives.distill import Distill
from jaxtrain.objectives.objective import Divergence
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores


def case(objective):
    """A batch, its scores from random logits, and the loss of the formulas in float64."""
    batch = tiny.packed_batch([[9, 3], [12]], 16)
    rng = np.random.default_rng(0)
    student, teacher = (2 * rng.normal(size=(*batch.tokens.shape, 11)) for _ in range(2))
    tempered = formula(objective.divergence, student / objective.temperature, teacher / objective.temperature)
    logp = student[..., 0] - np.log(np.exp(student).sum(-1))
    scores = Scores(
        logp=logp.astype(np.float32),
        entropy=rng.random(logp.shape).astype(np.float32),
        correct=(rng.random(logp.shape) > 0.5).astype(np.float32),
        divergence=tempered.astype(np.float32),
    )
    weights = np.asarray(batch.loss_weights, np.float64)
    losses = objective.divergence_weight * tempered - objective.ce_weight * logp
    return batch, scores, float((losses * weights).sum() / weights.sum())


@pytest.mark.parametrize(
    "objective",
    [
        Distill(),
        Distill(kind="reverse_kl", temperature=2.0, divergence_weight=4.0),
        Distill(kind="jsd", beta=0.2, ce_weight=0.5, divergence_weight=0.5),
    ],
    ids=str,
)
def test_loss_and_metrics_are_means_over_the_weighted_tokens(objective):
    batch, scores, expected = case(objective)
    loss, metrics = objective(scores, batch, batch_norm(batch))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["loss"].value) == pytest.approx(expected, rel=1e-5)
    weights = np.asarray(batch.loss_weights)
    named = {"divergence": scores.divergence, "ce_loss": -scores.logp, "entropy": scores.entropy}
    for name, values in (named | {"mean_token_accuracy": scores.correct}).items():
        np.testing.assert_allclose(metrics[name].value, np.average(values, weights=weights), rtol=1e-5)


def test_losses_of_microbatches_add_up():
    objective = Distill(ce_weight=0.3)
    batch, scores, expected = case(objective)
    parts = 0.0
    for rows in (slice(0, 1), slice(1, 2)):
        part = Scores(*(None if score is None else score[rows] for score in scores))
        parts += objective(part, batch.map(lambda column, rows=rows: column[rows]), batch_norm(batch))[0]
    np.testing.assert_allclose(parts, expected, rtol=1e-5)


def test_it_requests_its_divergence():
    objective = Distill(kind="jsd", beta=0.1, temperature=2.0)
    assert Divergence("jsd", 0.1, 2.0) in objective.needs and objective.separable
    assert objective.signals == ("teacher_hidden",)


def test_numbers_that_make_no_loss_are_refused():
    with pytest.raises(ValueError, match="beta=1"):
        Distill(kind="jsd", beta=1.0)
    assert "beta" in Distill().without_effect and not Distill(kind="jsd").without_effect
