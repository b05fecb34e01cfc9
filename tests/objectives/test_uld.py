import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.objectives.segments import group_probs, to_student
from jaxtrain.objectives.uld import ULD
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores

V, WIDER = 11, 17  # the vocabularies
MIXED = ULD(divergence_weight=0.7, ce_weight=0.3, top_k=4)


def softmax(x):
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def case(seed=0):
    """A packed batch with groups of one to three tokens on both sides, and the logits of both models."""
    rng = np.random.default_rng(seed)
    batch = tiny.packed_batch([[9, 7], [14]], 18, vocab_size=V)
    shape = batch.tokens.shape
    weights = (batch.positions > 1) * (batch.segment_ids > 0) * rng.uniform(0.5, 2, shape)
    teacher_tokens = rng.integers(0, WIDER, shape)
    places, other, shift = (np.zeros(shape, np.int32) for _ in range(3))
    for row, start, stop in ((0, 2, 9), (0, 11, 16), (1, 2, 14)):
        at = [start, start]
        while True:
            sizes = rng.integers(1, 4, 2)
            if max(at[0] + sizes[0], at[1] + sizes[1]) > stop:
                break
            shift[row, at[0]] = at[1] - at[0]
            for side, array in enumerate((places, other)):
                array[row, at[side] : at[side] + sizes[side]] = np.arange(1, sizes[side] + 1)
                at[side] += sizes[side]
    signals = {"group_place": places, "teacher_place": other, "teacher_shift": shift, "teacher_tokens": teacher_tokens}
    batch = batch._replace(loss_weights=weights.astype(np.float32), signals=signals)
    return batch, *(2 * rng.normal(size=(*shape, size)) for size in (V, WIDER))


def groups(batch):
    """(row, the student's first token and end, the teacher's) of every group."""
    for row, first in np.argwhere(batch.signals["group_place"] == 1):
        ends = []
        for name, at in (("group_place", first), ("teacher_place", first + batch.signals["teacher_shift"][row, first])):
            stop = at + 1
            while stop < batch.tokens.shape[1] and batch.signals[name][row, stop] > 1:
                stop += 1
            ends.append((at, stop))
        yield row, *ends


def distance(p, q, k):
    """ULD of two merged distributions by their sorted probabilities, the ranks beyond k in one bucket."""
    p, q = (np.pad(np.sort(x)[::-1], (0, WIDER + 1 - len(x))) for x in (p, q))
    return np.abs(p[:k] - q[:k]).sum() + abs(p[k:].sum() - q[k:].sum())


def formula(batch, student, teacher, objective):
    """The loss in float64, and the distance of each group with its weight; logits at t are those that predict t."""
    p, q = softmax(student), softmax(teacher)
    total, found = 0.0, []
    for row, (start, stop), (first, last) in groups(batch):
        mine = p[row, start] * np.prod([p[row, t, batch.tokens[row, t]] for t in range(start + 1, stop)])
        tokens = batch.signals["teacher_tokens"]
        theirs = q[row, first] * np.prod([q[row, t, tokens[row, t]] for t in range(first + 1, last)])
        found.append((distance(mine, theirs, objective.top_k), batch.loss_weights[row, start]))
        total += objective.divergence_weight * np.prod(found[-1])
    logp = np.log(np.take_along_axis(p, batch.tokens[..., None], 2)[..., 0])
    weights = batch.loss_weights.astype(np.float64)
    return (total - objective.ce_weight * (logp * weights).sum()) / weights.sum(), found


def scores_of(logits, tokens, k, weights):
    """As `token_scores` has them: 0 where a token is not scored."""
    logps = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(logps, tokens[..., None], 2)[..., 0]
    top, ids = jax.lax.top_k(logps, k)
    scored, zeros = weights != 0, jnp.zeros(logp.shape)
    return Scores(
        logp=jnp.where(scored, logp, 0),
        entropy=zeros,
        correct=zeros,
        top_logps=jnp.where(scored[..., None], top, 0),
        top_ids=ids,
    )


def with_teacher(batch, teacher, k):
    """The batch with the signal that the teacher's logits give."""
    places = batch.signals["teacher_place"]
    scores = scores_of(jnp.float32(teacher), batch.signals["teacher_tokens"], k, places)
    probs = to_student(group_probs(scores, places), batch)
    return batch._replace(signals={**batch.signals, "teacher_probs": probs})


def loss_of(batch, objective):
    def loss(logits):
        scores = scores_of(logits, batch.tokens, objective.top_k, batch.loss_weights)
        return objective(scores, batch, batch_norm(batch))

    return loss


def test_loss_and_gradient_are_those_of_the_formula():
    batch, student, teacher = case()
    expected, found = formula(batch, student, teacher, MIXED)
    assert len(found) > 5
    loss = loss_of(with_teacher(batch, teacher, MIXED.top_k), MIXED)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.float32(student))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    distances, weights = np.transpose(found)
    assert float(metrics["uld"].value) == pytest.approx(np.average(distances, weights=weights), rel=1e-5)
    in_groups = np.average(batch.signals["group_place"] > 0, weights=batch.loss_weights)
    assert float(metrics["aligned"].value) == pytest.approx(in_groups, rel=1e-5)
    assert float(metrics["loss"].value) == pytest.approx(expected, rel=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(4):
        direction = rng.normal(size=student.shape)
        ends = [formula(batch, student + step * direction, teacher, MIXED)[0] for step in (1e-6, -1e-6)]
        numeric = (ends[0] - ends[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("k", [1, 3, V])
def test_it_is_below_the_sum_over_all_ranks_by_less_than_its_gap(k):
    batch, student, teacher = case(2)
    objective = ULD(top_k=k, ce_weight=0.0)
    exact, _ = formula(batch, student, teacher, ULD(top_k=WIDER, ce_weight=0.0))
    loss, metrics = loss_of(with_teacher(batch, teacher, k), objective)(jnp.float32(student))
    gap = float(metrics["uld_gap"].total) / batch.loss_weights.sum()
    assert exact - gap - 1e-5 <= float(loss) <= exact + 1e-5
    assert (k == V) == (gap < 1e-5)


def test_equal_models_have_no_distance():
    batch, student, _ = case()
    same = batch.signals["group_place"]
    signals = {"teacher_place": same, "teacher_tokens": batch.tokens, "teacher_shift": 0 * same}
    batch = batch._replace(signals={**batch.signals, **signals})
    objective = ULD(ce_weight=0.0, top_k=4)
    loss = loss_of(with_teacher(batch, student, 4), objective)
    assert float(loss(jnp.float32(student))[0]) == 0
    assert float(loss(jnp.float32(student)[..., ::-1])[0]) > 0.01


def test_losses_of_microbatches_add_up():
    batch, student, teacher = case()
    batch = with_teacher(batch, teacher, MIXED.top_k)
    norm, parts = batch_norm(batch), 0.0
    for rows in (slice(0, 1), slice(1, 2)):
        part = batch.map(lambda column, rows=rows: column[rows])
        scores = scores_of(jnp.float32(student[rows]), part.tokens, MIXED.top_k, part.loss_weights)
        parts += float(MIXED(scores, part, norm)[0])
    assert parts == pytest.approx(float(loss_of(batch, MIXED)(jnp.float32(student))[0]), rel=1e-6)
