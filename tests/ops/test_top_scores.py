"""The largest log-probabilities of a token in the chunked head of `token_scores`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_problem import CHUNK, LENGTH, ROWS, VOCAB, assert_close, make_mesh, problem

from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.token_scores import LossDerivative, Scoring, Targets, token_scores
from jaxtrain.types import Scores

CAP, TEMPERATURE = 3.0, 0.7


def naive(hidden, head, tokens, weights, k) -> Scores:
    logits = CAP * jnp.tanh(jnp.einsum("btd,vd->btv", hidden[:, :-1], head[:VOCAB]) / CAP) / TEMPERATURE
    logps = jax.nn.log_softmax(logits)
    top, ids = jax.lax.top_k(logps, k)
    logp = jnp.take_along_axis(logps, tokens[:, 1:, None], 2)

    def padded(x):
        return jnp.pad(jnp.where(weights[:, 1:, None] != 0, x, 0), ((0, 0), (1, 0), (0, 0)))

    return Scores(logp=padded(logp)[..., 0], top_logps=padded(top), top_ids=padded(ids))


def mixed(scores, weights, ranks):
    """Whose derivative by every score differs from token to token."""
    return jnp.sum(weights * (jnp.exp(scores.top_logps) @ ranks - 0.3 * jnp.exp(0.2 * scores.logp)))


def curved(scores, weights, ranks):
    """Of all tokens together: nothing that could be assumed."""
    return jnp.sum(mixed(scores, weights, ranks) ** 2 + scores.top_logps[:, :, -1] * weights)


def check(k, loss=curved, mesh=None, assumed=False):
    hidden, head, tokens, weights = problem()
    ranks = jnp.linspace(1, -2, k)
    derivative = LossDerivative(jax.grad(mixed), weights, ranks) if assumed else None

    def score(h, w):
        how = Scoring(TEMPERATURE, top_k=k, chunk=CHUNK)
        return token_scores(
            h, Head(w, VOCAB, True, CAP), Targets(tokens, weights), how, loss_derivative=derivative, mesh=mesh
        )

    found, expected = jax.jit(score)(hidden, head), naive(hidden, head, tokens, weights, k)
    assert found.top_logps.shape == (ROWS, LENGTH, k)
    assert_close((found.logp, found.top_logps), (expected.logp, expected.top_logps))
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    of_found = jax.jit(jax.grad(lambda h, w: loss(score(h, w), weights, ranks), (0, 1)))(hidden, head)
    of_naive = jax.grad(lambda h, w: loss(naive(h, w, tokens, weights, k), weights, ranks), (0, 1))(hidden, head)
    scale = max(float(jnp.abs(g).max()) for g in of_naive)
    assert_close(of_found, of_naive, 1e-5 * max(scale, 1))


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_they_and_their_gradient_are_those_of_all_logits(k):
    check(k)


def test_an_assumed_derivative_gives_the_same_gradient():
    check(5, mixed, assumed=True)


@pytest.mark.parametrize(("shape", "k"), [((8, 1, 1, 1), 5), ((2, 1, 1, 2, 2), 5), ((1, 2, 1, 4), 40)])
def test_sharded_equals_single(shape, k):
    """Also where a shard of the vocabulary has fewer columns than k."""
    check(k, mesh=make_mesh(*shape))


def test_a_loss_without_them_has_its_gradient():
    check(5, lambda scores, weights, ranks: jnp.sum(scores.logp * weights))


def test_temporaries_are_a_fraction_of_the_naive_heads():
    """Compiled, not run: T = 4096, V = 128k."""
    length, width, vocab, k = 4096, 512, 128 * 1024, 128
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, length, width), (vocab, width)))
    tokens, weights = (jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, jnp.float32))

    def chunked(hidden, head, tokens, weights):
        scores = token_scores(hidden, Head(head, vocab, True), Targets(tokens, weights), Scoring(top_k=k))
        return jnp.sum(jnp.exp(scores.top_logps).sum(2) * weights)

    def whole(hidden, head, tokens, weights):
        logps = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden[:, :-1], head))
        return jnp.sum(jnp.exp(jax.lax.top_k(logps, k)[0]).sum(2) * weights[:, 1:])

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, tokens, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked) < 0.2 * temporaries(whole)
