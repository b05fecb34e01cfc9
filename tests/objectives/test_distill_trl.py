"""`Distill` beside TRL's GKDTrainer: loss and gradient by the student's logits, on the same logits.

TRL's are computed by tests/trl_divergences.py in the interpreter that JAXTRAIN_TRL_PYTHON names (with trl and torch).
Without it the tests are skipped.
"""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import trl_divergences

from jaxtrain.objectives.distill import Distill
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.token_scores import Scoring, Targets, Teacher, token_scores
from jaxtrain.train.step import batch_norm

PYTHON = os.environ.get("JAXTRAIN_TRL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTRAIN_TRL_PYTHON names no interpreter with TRL")

VOCAB, LENGTH = 50, 16
OURS = {
    "forward_kl": Distill(),
    "forward_kl, temperature 2": Distill(temperature=2.0),
    "reverse_kl": Distill(kind="reverse_kl"),
    "reverse_kl, temperature 0.7": Distill(kind="reverse_kl", temperature=0.7),
    "jsd": Distill(kind="jsd"),
    "jsd, beta 0.1, temperature 2": Distill(kind="jsd", beta=0.1, temperature=2.0),
}


def problem():
    """Packed rows of trained and untrained tokens, and logits [B, T, V] of a student and a teacher."""
    batch = tiny.packed_batch([[9, 3], [12]], LENGTH)
    rng = np.random.default_rng(0)
    student, teacher = (2 * rng.normal(size=(*batch.tokens.shape, VOCAB)).astype(np.float32) for _ in range(2))
    return batch._replace(tokens=rng.integers(0, VOCAB, batch.tokens.shape).astype(np.int32)), student, teacher


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    batch, student, teacher = problem()
    # The logits at a token are of the next one, and TRL's labels stand beside the logits.
    trained = np.pad(batch.loss_weights[:, 1:], ((0, 0), (0, 1))) > 0
    labels = np.where(trained, np.roll(batch.tokens, -1, 1), trl_divergences.IGNORED).astype(np.int64)
    np.savez(folder / "problem.npz", student=student, teacher=teacher, labels=labels)
    command = [PYTHON, Path(trl_divergences.__file__), folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "results.npz"))


def test_every_case_is_compared():
    assert OURS.keys() == trl_divergences.CASES.keys()


@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradient_are_trls(results, name):
    objective, (batch, student, teacher) = OURS[name], problem()
    head = Head(jnp.eye(VOCAB), VOCAB, False)  # so that the hidden states are the logits
    targets = Targets(jnp.asarray(batch.tokens), jnp.asarray(batch.loss_weights))

    def loss(hidden):
        scoring = Scoring(1.0, divergence=objective.divergence, chunk=8)
        scores = token_scores(hidden, head, targets, scoring, teacher=Teacher(jnp.asarray(teacher), head))
        scores = scores._replace(**{name: jnp.zeros(batch.tokens.shape) for name in ("entropy", "correct")})
        return objective(scores, batch, batch_norm(batch))[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(student))
    np.testing.assert_allclose(value, results[f"{name}: loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, results[f"{name}: gradient"], rtol=1e-4, atol=1e-7)
