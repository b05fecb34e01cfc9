import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from head_problem import CHUNK, LENGTH, ROWS, VOCAB, assert_close, make_mesh, problem
from jax.sharding import Mesh

from jaxtrain.ops import token_scores as head_of
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.token_scores import LossDerivative, Scoring, Targets, token_scores
from jaxtrain.types import Scores

HEADS = pytest.mark.parametrize("transposed", [True, False], ids=["tied", "untied"])
ASSUMED = pytest.mark.parametrize("assumed", ["linear", "curved", None])


def naive(hidden, head, tokens, weights, softcap: float | None = None) -> tuple[jax.Array, ...]:
    """[B, T, V] and all; `head` [Vp, D]."""
    logits = jnp.einsum("btd,vd->btv", hidden[:, :-1], head[:VOCAB])
    logp = jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))
    of_token = jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, -1)
    correct = jnp.argmax(logp, -1) == tokens[:, 1:]
    scored = weights[:, 1:] != 0
    return tuple(jnp.pad(jnp.where(scored, x, 0), ((0, 0), (1, 0))) for x in (of_token, entropy, correct))


def projection(head: jax.Array, transposed: bool, softcap: float | None = None) -> Head:
    """From [Vp, D]."""
    return Head(head if transposed else head.T, VOCAB, transposed, softcap)


def scorer(tokens, weights, transposed, mesh=None, assumed=None, chunk=CHUNK, softcap=None):
    if assumed is not None:
        of_logp = DERIVATIVES[assumed]
        assumed = LossDerivative(
            lambda scores, rows, divisor: Scores(logp=of_logp(scores.logp, rows, divisor)),
            (weights, factors(weights)),
            DIVISOR,
        )

    def score(hidden, head):
        return token_scores(
            hidden,
            projection(head, transposed, softcap),
            Targets(tokens, weights),
            Scoring(chunk=chunk),
            loss_derivative=assumed,
            mesh=mesh,
        )

    return score


DIVISOR = 7.0
# Sums over tokens: linear in logp with the weights, as SFT has it, and of factors beside a ratio, as RL has it.
LOSSES = {
    "linear": lambda logp, rows, divisor: -jnp.sum(logp * rows[0]) / divisor,
    "curved": lambda logp, rows, divisor: jnp.sum(jnp.exp(0.1 * logp) * rows[1] * (rows[0] != 0)) / divisor,
}
DERIVATIVES = {name: jax.grad(loss) for name, loss in LOSSES.items()}


def factors(weights):
    return jnp.asarray(np.random.default_rng(9).normal(size=weights.shape), jnp.float32)


def check_against_naive(
    transposed: bool, assumed: str | None, mesh: Mesh | None = None, softcap: float | None = None
) -> None:
    """Check the gradients of both losses, whichever of them was assumed."""
    hidden, head, tokens, weights = problem()
    score = scorer(tokens, weights, transposed, mesh, assumed, softcap=softcap)
    expected = naive(hidden, head, tokens, weights, softcap)
    assert_close(jax.jit(score)(hidden, head), expected)
    for loss in LOSSES.values():
        of = functools.partial(loss, rows=(weights, factors(weights)), divisor=DIVISOR)
        actual = jax.jit(jax.value_and_grad(lambda h, w, of=of: of(score(h, w).logp), (0, 1)))(hidden, head)
        wanted = jax.value_and_grad(lambda h, w, of=of: of(naive(h, w, tokens, weights, softcap)[0]), (0, 1))
        assert_close(actual, wanted(hidden, head))
        assert not actual[1][1][VOCAB:].any(), "the padded vocabulary has a gradient"


@ASSUMED
@HEADS
def test_equals_the_naive_head_in_scores_and_gradients(transposed, assumed):
    check_against_naive(transposed, assumed)


@ASSUMED
@HEADS
def test_capped_logits_too(transposed, assumed):
    check_against_naive(transposed, assumed, make_mesh(1, 4, 1, 2) if assumed else None, softcap=3.0)


# Each mesh with each loss, and each of the two with both heads.
@pytest.mark.parametrize(
    ("shape", "assumed", "transposed"),
    [
        pytest.param(shape, assumed, (row + column) % 2 == 0, id=f"{shape}-{assumed}-{'un' * ((row + column) % 2)}tied")
        for row, shape in enumerate([(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 1, 2, 2), (1, 2, 2, 2)])
        for column, assumed in enumerate(["linear", "curved", None])
    ],
)
def test_sharded_equals_single(transposed, assumed, shape):
    check_against_naive(transposed, assumed, make_mesh(*shape))


def test_data_shards_may_differ_in_how_many_chunks_they_walk():
    hidden, head, tokens, weights = problem()
    weights = weights.at[0].set(1).at[1:].set(0)  # one device walks three chunks, seven walk none
    score = scorer(tokens, weights, True, make_mesh(1, 8, 1, 1))
    gradient = jax.grad(lambda h, w: score(h, w).logp.sum(), (0, 1))
    expected = jax.grad(lambda h, w: naive(h, w, tokens, weights)[0].sum(), (0, 1))
    assert_close(jax.jit(gradient)(hidden, head), expected(hidden, head))


@pytest.mark.parametrize("shape", [None, (2, 1, 1, 2, 2)], ids=str)
@HEADS
def test_temperature_and_supports_make_the_distribution_that_was_drawn_from(transposed, shape):
    """Also of a token without a support, and with the vocabulary split over devices."""
    hidden, head, tokens, weights = problem()
    rng = np.random.default_rng(1)
    supports = rng.integers(0, VOCAB, (ROWS, LENGTH, 7)).astype(np.int32)
    supports[..., 0] = tokens  # what was drawn could be drawn
    supports[:, :, 5:][rng.random((ROWS, LENGTH)) < 0.5] = -1
    supports[2, :20] = -1
    allowed = np.zeros((ROWS, LENGTH, VOCAB), bool)
    for (row, place, _), token in np.ndenumerate(supports):
        allowed[row, place, token] |= token >= 0
    allowed[2, :20] = True

    def expected(h, w):
        logits = jnp.einsum("btd,vd->btv", h[:, :-1], w[:VOCAB]) / 0.7
        logp = jax.nn.log_softmax(jnp.where(allowed[:, 1:], logits, -jnp.inf))
        of_token = jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]
        entropy = -jnp.sum(jnp.where(allowed[:, 1:], jnp.exp(logp) * jnp.where(allowed[:, 1:], logp, 0), 0), -1)
        return tuple(jnp.pad(jnp.where(weights[:, 1:] != 0, x, 0), ((0, 0), (1, 0))) for x in (of_token, entropy))

    def score(h, w):
        targets = Targets(tokens, weights, jnp.asarray(supports))
        how = Scoring(temperature=0.7, chunk=CHUNK)
        return token_scores(h, projection(w, transposed), targets, how, mesh=shape and make_mesh(*shape))

    assert_close(jax.jit(score)(hidden, head)[:2], expected(hidden, head))
    loss = functools.partial(LOSSES["curved"], rows=(weights, factors(weights)), divisor=DIVISOR)
    actual = jax.jit(jax.grad(lambda h, w: loss(score(h, w).logp), (0, 1)))(hidden, head)
    assert_close(actual, jax.grad(lambda h, w: loss(expected(h, w)[0]), (0, 1))(hidden, head))


@pytest.mark.parametrize("shape", [None, (2, 2, 1, 2)], ids=str)
def test_logits_are_recomputed_only_for_a_loss_that_was_not_assumed(shape, monkeypatch):
    hidden, head, tokens, weights = problem()

    def poison(plan, compact, rows, heads, *_):
        return heads.student.weight.T * jnp.nan

    monkeypatch.setattr(head_of, "_head_gradient", poison)
    score = scorer(tokens, weights, True, shape and make_mesh(*shape), "curved")

    def poisoned(name):
        loss = functools.partial(LOSSES[name], rows=(weights, factors(weights)), divisor=DIVISOR)
        gradient = jax.jit(jax.grad(lambda h, w: loss(score(h, w).logp), (0, 1)))(hidden, head)
        return any(bool(jnp.isnan(g).any()) for g in gradient)

    assert not poisoned("curved")
    assert poisoned("linear")


@HEADS
def test_result_does_not_depend_on_the_chunk(transposed):
    hidden, head, tokens, weights = problem()
    one, many = (scorer(tokens, weights, transposed, chunk=chunk)(hidden, head) for chunk in (4096, 7))
    assert_close(many, one)


def test_nothing_weighted_gives_zeros_and_no_gradient():
    hidden, head, tokens, weights = problem()
    score = scorer(tokens, jnp.zeros_like(weights).at[:, 0].set(1), True, assumed="linear")
    value, gradients = jax.value_and_grad(lambda h, w: score(h, w).logp.sum(), (0, 1))(hidden, head)
    assert value == 0 and not any(g.any() for g in gradients)


def test_positions_without_weight_may_hold_anything():
    """Not even a NaN in the hidden state of a position that scores nothing reaches the others."""
    hidden, head, tokens, weights = problem()
    idle = jnp.pad(weights[:, 1:], ((0, 0), (0, 1)))[..., None] == 0
    score = scorer(tokens, weights, True, assumed="linear")
    gradient = jax.value_and_grad(lambda h, w: jnp.sum(score(h, w).logp * weights), (0, 1))
    assert_close(gradient(jnp.where(idle, jnp.nan, hidden), head), gradient(hidden, head), 0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", [None, (2, 2, 1, 2)], ids=str)
@HEADS
def test_a_differentiable_entropy_has_the_naive_heads_gradient(transposed, shape, frozen):
    """With capped logits and a temperature, alone and beside a log-probability."""
    hidden, head, tokens, weights = problem()
    how = Scoring(temperature=0.7, differentiable_entropy=True, chunk=CHUNK)
    mesh = shape and make_mesh(*shape)

    def score(h, w):
        scores = token_scores(h, projection(w, transposed, 3.0), Targets(tokens, weights), how, mesh=mesh)
        return scores.logp, scores.entropy

    def expected(h, w):
        bent = 3.0 * jnp.tanh(jnp.einsum("btd,vd->btv", h[:, :-1], w[:VOCAB]) / 3.0)
        logp = jax.nn.log_softmax(bent / 0.7)
        values = jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0], -jnp.sum(jnp.exp(logp) * logp, -1)
        return tuple(jnp.pad(jnp.where(weights[:, 1:] != 0, x, 0), ((0, 0), (1, 0))) for x in values)

    def both(logp, entropy):
        return jnp.sum(logp * weights) / DIVISOR + jnp.sum(factors(weights) * entropy**2)

    argnums = 0 if frozen else (0, 1)
    for loss in (both, lambda logp, entropy: jnp.sum(entropy)):
        actual = jax.jit(jax.value_and_grad(lambda h, w, loss=loss: loss(*score(h, w)), argnums))(hidden, head)
        wanted = jax.value_and_grad(lambda h, w, loss=loss: loss(*expected(h, w)), argnums)(hidden, head)
        np.testing.assert_allclose(actual[0], wanted[0], rtol=1e-5)
        assert_close(actual[1], wanted[1], 2e-5)


def test_entropy_and_correct_carry_no_gradient():
    hidden, head, tokens, weights = problem()
    score = scorer(tokens, weights, True)
    gradients = jax.grad(lambda h, w: score(h, w).entropy.sum() + score(h, w).correct.sum(), (0, 1))(hidden, head)
    assert not any(g.any() for g in gradients)


@ASSUMED
def test_a_frozen_head_costs_no_product_of_its_own(assumed):
    hidden, head, tokens, weights = problem()
    score = scorer(tokens, weights, True, assumed=assumed)

    def products(argnums):
        gradient = jax.grad(lambda h, w: jnp.sum(score(h, w).logp * weights), argnums)
        return str(jax.make_jaxpr(gradient)(hidden, head)).count("dot_general")

    assert products(0) == 2
    assert products((0, 1)) > 2


def test_bfloat16_follows_float32_and_sums_the_head_gradient_in_float32():
    hidden, head, tokens, weights = problem(dtype="bfloat16")
    score = scorer(tokens, weights, True, assumed="linear")

    def loss(h, w):
        return jnp.sum(score(h, w).logp * weights)

    value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, head)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    exact = jax.value_and_grad(lambda h, w: jnp.sum(naive(h, w, tokens, weights)[0] * weights), (0, 1))
    expected, (expected_hidden, expected_head) = exact(hidden.astype(jnp.float32), rounded)
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # products of bfloat16 numbers are exact in float32
    for actual, wanted in ((d_hidden, expected_hidden), (d_head, expected_head)):
        error = jnp.linalg.norm(actual.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        assert error < 2**-7, error


@HEADS
def test_temporaries_are_a_fraction_of_the_naive_heads(transposed):
    """Compiled, not run: T = 4096, V = 128k."""
    length, width, vocab = 4096, 512, 128 * 1024
    hidden = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    head = jax.ShapeDtypeStruct((vocab, width) if transposed else (width, vocab), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((1, length), jnp.float32)

    def chunked(hidden, head, tokens, weights):
        assumed = LossDerivative(lambda scores, rows, shared: Scores(logp=rows), weights, None)
        of, targets = Head(head, vocab, transposed), Targets(tokens, weights)
        return jnp.sum(token_scores(hidden, of, targets, loss_derivative=assumed).logp * weights)

    def whole(hidden, head, tokens, weights):
        logits = jnp.einsum("btd,vd->btv" if transposed else "btd,dv->btv", hidden[:, :-1], head)
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0] * weights[:, 1:])

    def temporaries(loss):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, tokens, weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked) < 0.15 * temporaries(whole)
