"""The chunked form equals the recurrence, with its gradients; documents and padding leave other states alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.delta_rule import CHUNK, gated_delta_rule, unit_lower_inverse

ROWS, HEADS, GROUPS, KEY, VALUE = 2, 2, 3, 8, 5
LENGTH = 2 * CHUNK + 9
STARTS = np.zeros((ROWS, LENGTH), bool)
STARTS[0, [3, CHUNK - 1, CHUNK + 5, 2 * CHUNK]] = STARTS[1, 0] = True  # row 0 goes on with the state that it is given


def inputs(length=LENGTH, seed=0, correlated=False):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, ROWS, length, HEADS, KEY))
    if correlated:
        k = k[:, :1] + 0.01 * k  # as of a repeated token
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(ROWS, length, HEADS, GROUPS, VALUE))
    decay = -np.exp(rng.normal(-3, 2, (ROWS, length, HEADS, GROUPS)))
    beta = 1 / (1 + np.exp(-rng.normal(0, 2, decay.shape)))
    state = rng.normal(size=(ROWS, HEADS, GROUPS, KEY, VALUE))
    return [np.asarray(each, np.float32) for each in (q, k, v, decay, beta)], np.asarray(state, np.float32)


def recurrence(tokens, starts, state):
    """The equations, in float64."""
    q, k, v, decay, beta = (np.asarray(each, np.float64) for each in tokens)
    state, out = np.asarray(state, np.float64), []
    for t in range(q.shape[1]):
        state = state * np.exp(decay[:, t])[..., None, None] * ~starts[:, t, None, None, None, None]
        held = np.einsum("bhgij,bhi->bhgj", state, k[:, t])
        state = state + np.einsum("bhi,bhgj->bhgij", k[:, t], beta[:, t, ..., None] * (v[:, t] - held))
        out.append(np.einsum("bhgij,bhi->bhgj", state, q[:, t]))
    return np.stack(out, 1), state


@pytest.mark.parametrize("correlated", [False, True])
def test_chunks_equal_the_recurrence(correlated):
    tokens, state = inputs(correlated=correlated)
    out, last = jax.jit(gated_delta_rule)(*tokens, STARTS, state)
    expected, expected_last = recurrence(tokens, STARTS, state)
    assert out.dtype == last.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(last, expected_last, atol=2e-5 * np.abs(expected_last).max())


def test_a_token_at_a_time_and_parts_of_a_row_give_the_same():
    tokens, state = inputs(14)
    starts = STARTS[:, :14]
    run, parts = jax.jit(gated_delta_rule), []
    whole, last = run(*tokens, starts, state)
    for first, stop in ((0, 6), (6, 7), (7, 8), (8, 14)):
        out, state = run(*(each[:, first:stop] for each in tokens), starts[:, first:stop], state)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_gradients_equal_those_of_the_recurrence():
    tokens, state = inputs(CHUNK + 6)
    starts = STARTS[:, : CHUNK + 6]

    def one_by_one(*tokens_and_state):
        *tokens, state = tokens_and_state

        def step(state, each):
            out, state = gated_delta_rule(*(leaf[:, None] for leaf in each), state)
            return state, out[:, 0]

        state, out = jax.lax.scan(step, state, [jnp.moveaxis(each, 1, 0) for each in (*tokens, starts)])
        return jnp.sum(jnp.sin(jnp.moveaxis(out, 0, 1))) + jnp.sum(state**2)

    def chunked(*tokens_and_state):
        *tokens, state = tokens_and_state
        out, last = gated_delta_rule(*tokens, starts, state)
        return jnp.sum(jnp.sin(out)) + jnp.sum(last**2)

    ours, expected = (jax.jit(jax.grad(f, range(6)))(*tokens, state) for f in (chunked, one_by_one))
    for each, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(each, other, atol=1e-4 * np.abs(other).max())


def test_a_document_does_not_see_the_others_to_the_last_bit():
    tokens, state = inputs()
    other, other_state = inputs(seed=7)
    documents = np.cumsum(STARTS[0])
    run = jax.jit(gated_delta_rule)
    before, last = run(*tokens, STARTS, state)
    for changed in range(documents[-1] + 1):
        mixed = [
            np.where(np.reshape(documents == changed, (-1, *[1] * (a.ndim - 2))), b, a)
            for a, b in zip(tokens, other, strict=True)
        ]
        after, after_last = run(*mixed, STARTS, other_state if changed == 0 else state)
        rest = documents != changed
        np.testing.assert_array_equal(after[0, rest], before[0, rest])
        assert not np.array_equal(after[0, ~rest], before[0, ~rest])
        assert np.array_equal(after_last[0], last[0]) == (changed != documents[-1])


def test_padding_leaves_the_state_as_it_is():
    tokens, state = inputs(11)
    for length in (1, 11):
        q, k, v, *_ = (each[:, :length] for each in tokens)
        zeros = np.zeros((ROWS, length, HEADS, GROUPS), np.float32)
        _, last = gated_delta_rule(q, k, v, zeros, zeros, np.zeros((ROWS, length), bool), state)
        np.testing.assert_array_equal(last, state)


def test_the_inverse_is_exact_where_powers_of_the_matrix_are_not():
    """Of equal keys without decay: the powers of the matrix are binomial coefficients up to 1e18."""
    lower = np.tril(np.ones((CHUNK, CHUNK), np.float32), -1)
    expected = np.eye(CHUNK) - np.eye(CHUNK, k=-1)
    np.testing.assert_allclose(unit_lower_inverse(jnp.asarray(lower)), expected, atol=1e-6)
