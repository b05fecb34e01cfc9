import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.head_chunks import (
    Compact,
    Head,
    Heads,
    Plan,
    TokenRows,
    joint_derivative,
    logits_of,
    logp_derivative,
    stats_of,
)
from jaxtrain.types import Scores

C, D, V = 4, 6, 10
RNG = np.random.default_rng(0)
X, HEAD = (RNG.normal(size=shape).astype(np.float32) for shape in ((C, D), (D, V)))
TOKENS = jnp.asarray([3, 0, 7, 3])
ROWS = TokenRows(jnp.asarray(X), TOKENS)


def plan(**changes):
    settings = {
        "temperature": 1.0,
        "chunk": C,
        "length": C,
        "derivative": None,
        "differentiable_entropy": False,
        "divergence": None,
        "top_k": None,
        "sharded": False,
        "parts": 1,
    }
    return Plan(**(settings | changes))


def scores(plan, weight, softcap=None):
    heads = Heads(Head(jnp.asarray(weight), V, softcap=softcap))
    logits = logits_of(plan, heads, ROWS)
    return heads, logits, *stats_of(plan, heads, logits)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.0)])
def test_statistics_and_derivatives_are_those_of_the_softmax(temperature, softcap):
    of = plan(temperature=temperature, differentiable_entropy=True)

    def reference(products):
        logits = products if softcap is None else softcap * jnp.tanh(products / softcap)
        logp = jax.nn.log_softmax(logits / temperature)
        return logp[jnp.arange(C), TOKENS], -(jnp.exp(logp) * logp).sum(1)

    products = jnp.asarray(X @ HEAD)
    (logp, entropy), pull = jax.vjp(reference, products)
    heads, logits, stats, p = scores(of, HEAD, softcap)
    np.testing.assert_allclose(stats.logp, logp, atol=1e-5)
    np.testing.assert_allclose(stats.entropy, entropy, atol=1e-5)
    np.testing.assert_array_equal(stats.correct, products.argmax(1) == TOKENS)
    ones, zeros = jnp.ones(C), jnp.zeros(C)
    np.testing.assert_allclose(logp_derivative(p, logits, jnp.float32), pull((ones, zeros))[0], atol=1e-5)
    for g in ((ones, zeros), (zeros, ones), (ones, 2 * ones)):
        derivative = joint_derivative(of, heads, logits, stats, Scores(logp=g[0], entropy=g[1]))
        np.testing.assert_allclose(derivative, pull(g)[0], atol=1e-5)


def test_columns_beyond_the_vocabulary_have_no_probability():
    padded = np.pad(HEAD, ((0, 0), (0, 3)), constant_values=9)
    *_, stats, p = scores(plan(), padded)
    *_, expected, expected_p = scores(plan(), HEAD)
    np.testing.assert_allclose(stats.logp, expected.logp, atol=1e-5)
    np.testing.assert_allclose(p, np.pad(expected_p, ((0, 0), (0, 3))), atol=1e-6)


def test_weighted_tokens_move_to_the_front_and_back():
    weights = jnp.asarray([0.0, 1, 0, 2, 1, 0, 0.5])
    compact = Compact.of(weights, 3)
    assert compact.num_chunks == 2 and len(compact.source) == 9
    values = jnp.arange(10.0, 17)
    np.testing.assert_array_equal(compact.all_rows(values), [11, 13, 14, 16, 0, 0, 0, 0, 0])
    second = compact.rows_of_chunk(jnp.asarray(1), 3, values)
    np.testing.assert_array_equal(second, [16, 0, 0])
    np.testing.assert_array_equal(compact.put(jnp.asarray(0), 3, jnp.asarray([1.0, 2, 3])), [0, 1, 0, 2, 3, 0, 0])
    np.testing.assert_array_equal(compact.expand(compact.all_rows(values)), values * (weights != 0))


def test_shifting_by_a_token_and_back():
    rows = plan(length=3)
    x = jnp.asarray([[1.0, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(rows.shift_left(x), [2, 3, 0, 5, 6, 0])
    np.testing.assert_array_equal(rows.shift_right(rows.shift_left(x)), [[0, 2, 3], [0, 5, 6]])
