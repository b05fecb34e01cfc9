"""`GOLD` beside a transcription of its formula and, where JAXTRAIN_TRL_PYTHON names an interpreter, TRL's loss."""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trl_gold

from jaxtrain.objectives.gold import GOLD
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import GroupStarts, MatchedHead, hybrid_distances, match_vocabularies
from jaxtrain.train.step import batch_norm
from jaxtrain.types import Scores

PYTHON = os.environ.get("JAXTRAIN_TRL_PYTHON")
V, WIDER, LENGTH = 11, 17, 9
# Shared tokens have other ids; the rest is written otherwise.
STUDENT_TOKENS = [f"both{n}" for n in range(7)] + [f"mine{n}" for n in range(V - 7)]
TEACHER_TOKENS = [f"theirs{n}" for n in range(WIDER - 7)] + [f"both{n}" for n in reversed(range(7))]
CASES = {name: GOLD(beta=beta, matched_weight=m, unmatched_weight=u) for name, (beta, m, u) in trl_gold.CASES.items()}


def ids():
    vocabularies = [{token: n for n, token in enumerate(tokens)} for tokens in (STUDENT_TOKENS, TEACHER_TOKENS)]
    return match_vocabularies(*vocabularies, V, WIDER)


def identity(size):
    return Head(jnp.eye(size), size)


def problem():
    """Logits that predict the token at a place, for rows whose first token no state predicts; groups at some places."""
    rng = np.random.default_rng(0)
    first = rng.random((2, LENGTH)) < 0.6
    first[:, 0] = False
    student, teacher = (2 * rng.normal(size=(2, LENGTH, size)).astype(np.float32) for size in (V, WIDER))
    further = [-rng.exponential(size=first.shape).astype(np.float32) * (rng.random(first.shape) < 0.5) for _ in "pq"]
    return first, student, teacher, *further


def distances(student, beta, chunk=4):
    first, _, teacher, mine, theirs = problem()
    hidden = jnp.roll(student, -1, 1)  # the state before a token predicts it
    groups = GroupStarts(first, mine, teacher, theirs)
    matched_head = MatchedHead(identity(WIDER), ids())
    return hybrid_distances(hidden, identity(V), groups, matched_head, beta=beta, chunk=chunk)


def loss_of(student, objective, chunk=4):
    """A mean over the groups, by the objective."""
    first, student = problem()[0], jnp.asarray(student)
    parts, zeros = distances(student, objective.beta, chunk), jnp.zeros(first.shape)
    share = ids().teacher.shape[0] / WIDER
    weights = objective.needs[-1].weights or (share, 1 - share)
    hybrid = weights[0] * parts.matched + weights[1] * parts.unmatched
    scores = Scores(zeros, zeros, zeros, hybrid=hybrid, matched=parts.matched, unmatched=parts.unmatched)
    batch = tiny.packed_batch([[LENGTH], [LENGTH]], LENGTH)
    batch = batch._replace(loss_weights=first.astype(np.float32), signals={"group_place": first.astype(np.int32)})
    return objective(scores, batch, batch_norm(batch))[0]


def softmax(x):
    exps = np.exp(x - x.max())
    return exps / exps.sum()


def formula(student, objective):
    """In float64."""
    first, _, teacher, mine, theirs = problem()
    both = [(STUDENT_TOKENS.index(token), n) for n, token in enumerate(TEACHER_TOKENS) if token in STUDENT_TOKENS]
    losses = []
    for place in zip(*np.nonzero(first), strict=True):
        p = softmax(student[place].astype(np.float64)) * np.exp(mine[place])
        q = softmax(teacher[place].astype(np.float64)) * np.exp(theirs[place])
        matched, beta = 0.0, objective.beta
        for n, m in both:
            mixture = (1 - beta) * p[n] + beta * q[m]
            terms = q[m] * np.log(q[m] / mixture), p[n] * np.log(p[n] / mixture)
            ends = {0: q[m] * np.log(q[m] / p[n]), 1: p[n] * np.log(p[n] / q[m])}
            matched += ends.get(beta, beta * terms[0] + (1 - beta) * terms[1])
        rests = (np.delete(x, [pair[side] for pair in both]) for side, x in enumerate((p, q)))
        mine_rest, other_rest = (np.pad(np.sort(x)[::-1], (0, WIDER - len(x))) for x in rests)
        share = len(both) / WIDER
        weights = (share, 1 - share)
        if objective.matched_weight is not None:
            weights = objective.matched_weight, objective.unmatched_weight
        losses.append(weights[0] * matched + weights[1] * np.abs(mine_rest - other_rest).sum())
    return np.mean(losses)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_formula(name):
    student = problem()[1]
    value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(student), CASES[name])
    assert float(value) == pytest.approx(formula(student, CASES[name]), rel=1e-5)
    direction = np.random.default_rng(1).normal(size=student.shape)
    ends = [formula(student + step * direction, CASES[name]) for step in (1e-6, -1e-6)]
    assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-5)


@pytest.mark.skipif(not PYTHON, reason="JAXTRAIN_TRL_PYTHON names no interpreter with TRL")
def test_loss_and_gradient_are_trls(tmp_path):
    first, student, teacher, mine, theirs = problem()
    arrays = {"student": student[first], "teacher": teacher[first]}
    arrays |= {"student_further": mine[first], "teacher_further": theirs[first]}
    np.savez(tmp_path / "problem.npz", student_tokens=STUDENT_TOKENS, teacher_tokens=TEACHER_TOKENS, **arrays)
    command = [PYTHON, Path(trl_gold.__file__), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    results = np.load(tmp_path / "results.npz")
    for name, objective in CASES.items():
        value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(student), objective)
        np.testing.assert_allclose(value, results[f"{name}: loss"], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(gradient[first], results[f"{name}: gradient"], rtol=1e-4, atol=1e-6, err_msg=name)


def test_weights_are_given_together():
    with pytest.raises(ValueError, match="give both"):
        GOLD(matched_weight=0.5)
    with pytest.raises(ValueError, match="beta"):
        GOLD(beta=1.5)
