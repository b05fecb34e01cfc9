"""The divergence from a teacher in the chunked head of `token_scores`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergences import KINDS, formula, sparse_formula
from head_problem import CHUNK, LENGTH, PADDED, ROWS, VOCAB, assert_close, make_mesh, problem

from jaxtrain.objectives.objective import Divergence, SparseDivergence
from jaxtrain.ops import token_scores as head_of
from jaxtrain.ops.head_chunks import Head, TopK
from jaxtrain.ops.token_scores import LossDerivative, Scoring, Targets, Teacher, token_scores
from jaxtrain.types import Scores

WIDER = 24  # the teacher's width
TEACHER_VOCAB, TEACHER_PADDED = VOCAB - 3, PADDED + 32
COMMON = TEACHER_VOCAB


def teacher_of(transposed: bool) -> Teacher:
    rng = np.random.default_rng(5)
    weight = np.zeros((TEACHER_PADDED, WIDER), np.float32)
    weight[:TEACHER_VOCAB] = rng.normal(size=(TEACHER_VOCAB, WIDER))
    weight[TEACHER_VOCAB:] = 7  # what the padding holds does not matter
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDER)), jnp.float32)
    return Teacher(hidden, Head(jnp.asarray(weight if transposed else weight.T), TEACHER_VOCAB, transposed, 5.0))


def logits_of(hidden, weight, softcap=None):
    logits = jnp.einsum("btd,vd->btv", hidden[:, :-1], weight)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def naive(of: Divergence, hidden, weight, tokens, weights, temperature=1.0):
    """(logp, divergence) from [B, T, V]; the divergence by jnp's own derivatives."""
    teacher = teacher_of(True)
    student = logits_of(hidden, weight[:VOCAB])
    logp = jnp.take_along_axis(jax.nn.log_softmax(student / temperature), tokens[:, 1:, None], 2)[..., 0]
    log_p = jax.nn.log_softmax(student[..., :COMMON] / of.temperature)
    log_q = jax.nn.log_softmax(logits_of(teacher.hidden, teacher.head.weight[:COMMON], 5.0) / of.temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if of.kind == "jsd":
        log_m = jnp.log(of.beta * q + (1 - of.beta) * p)
        terms = of.beta * q * (log_q - log_m) + (1 - of.beta) * p * (log_p - log_m)
    else:
        terms = q * (log_q - log_p) if of.kind == "forward_kl" else p * (log_p - log_q)
    return tuple(jnp.pad(jnp.where(weights[:, 1:] != 0, x, 0), ((0, 0), (1, 0))) for x in (logp, terms.sum(-1)))


def mixed(scores: Scores, weights, shared) -> jax.Array:
    """A separable loss of both scores."""
    return jnp.sum(weights * (0.1 * scores.divergence**2 - 0.3 * jnp.exp(0.2 * scores.logp))) / shared


def scorer(of, tokens, weights, transposed=False, mesh=None, assumed=True, temperature=1.0):
    derivative = LossDerivative(jax.grad(mixed), weights, 7.0) if assumed else None
    teacher = teacher_of(transposed)

    def score(hidden, weight):
        head = Head(weight if transposed else weight.T, VOCAB, transposed)
        scoring = Scoring(temperature, divergence=of, chunk=CHUNK)
        targets = Targets(tokens, weights)
        return token_scores(hidden, head, targets, scoring, teacher=teacher, loss_derivative=derivative, mesh=mesh)

    return score


def check(of, loss=mixed, argnums=(0, 1), **how):
    hidden, head, tokens, weights = problem()
    head /= 2  # logits of common sizes
    score = scorer(of, tokens, weights, **how)
    temperature = how.get("temperature", 1.0)
    expected = naive(of, hidden, head, tokens, weights, temperature)
    actual = jax.jit(score)(hidden, head)
    assert_close((actual.logp, actual.divergence), expected)

    def wanted(h, w):
        logp, divergence = naive(of, h, w, tokens, weights, temperature)
        return loss(Scores(logp=logp, divergence=divergence), weights, 7.0)

    gradient = jax.jit(jax.grad(lambda h, w: loss(score(h, w), weights, 7.0), argnums))(hidden, head)
    assert_close(gradient, jax.grad(wanted, argnums)(hidden, head), 2e-5)


@pytest.mark.parametrize("of", KINDS[:3], ids=str)
def test_equals_the_paper_and_the_naive_gradient(of):
    check(of)
    hidden, head, tokens, weights = problem()
    teacher = teacher_of(True)
    scores = scorer(of, tokens, weights)(hidden, head)
    student = np.asarray(logits_of(hidden, head[:COMMON]), np.float64)
    wanted = formula(of, student, np.asarray(logits_of(teacher.hidden, teacher.head.weight[:COMMON], 5.0), np.float64))
    scored = np.asarray(weights[:, 1:]) != 0
    np.testing.assert_allclose(np.asarray(scores.divergence)[:, 1:][scored], wanted[scored], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "transposed"), [((8, 1, 1, 1), False), ((2, 2, 1, 2), True), ((1, 2, 1, 2, 2), False)]
)
def test_sharded_equals_single(shape, transposed):
    """Also with vocabularies that are padded differently and of another temperature than the log-probability's."""
    check(Divergence("jsd", 0.3, 2.0), mesh=make_mesh(*shape), transposed=transposed, temperature=0.7)


@pytest.mark.parametrize(("of", "argnums"), [(KINDS[0], 0), (KINDS[2], (0, 1))], ids=["frozen", "trained"])
def test_any_other_loss_has_its_gradient_too(of, argnums):
    """One with another derivative than was assumed, one of the log-probability alone, one with nothing assumed."""

    def curved(scores, weights, shared):
        return jnp.sum(0.1 * weights * scores.divergence) ** 2 / shared

    def of_logp(scores, weights, shared):
        return jnp.sum(weights * scores.logp) / shared

    check(of, curved, argnums=argnums)
    check(of, of_logp, argnums=argnums)
    check(of, assumed=False, argnums=argnums)


def test_logits_are_recomputed_only_for_a_loss_that_was_not_assumed(monkeypatch):
    hidden, head, tokens, weights = problem()

    def poison(plan, compact, rows, heads, *_):
        return jnp.full((len(compact.source), hidden.shape[2]), jnp.nan), heads.student.weight * jnp.nan

    monkeypatch.setattr(head_of, "_gradients", poison)
    score = scorer(KINDS[1], tokens, weights)
    losses = {False: mixed, True: lambda scores, weights, shared: jnp.sum(scores.divergence * weights)}
    for poisoned, loss in losses.items():
        gradient = jax.jit(jax.grad(lambda h, w, loss=loss: loss(score(h, w), weights, 7.0), (0, 1)))(hidden, head)
        assert poisoned == any(bool(jnp.isnan(g).any()) for g in gradient)


def test_four_products_with_a_trained_head_and_three_with_a_frozen_one(monkeypatch):
    """The teacher's logits are one product more than a loss of the log-probability alone takes."""
    hidden, head, tokens, weights = problem()
    score = scorer(KINDS[0], tokens, weights)
    zeros = jnp.zeros((-(-tokens.size // CHUNK) * CHUNK, hidden.shape[2])), jnp.zeros((hidden.shape[2], PADDED))
    monkeypatch.setattr(head_of, "_gradients", lambda *arguments: (zeros[0], zeros[1] if arguments[-1] else None))
    monkeypatch.setattr(head_of, "outer", lambda x, derivative, scale: head_of.dot(x, derivative, 0, 0))

    def products(argnums):
        gradient = jax.grad(lambda h, w: mixed(score(h, w), weights, 7.0), argnums)
        return str(jax.make_jaxpr(gradient)(hidden, head)).count("dot_general")

    assert products(0) == 3
    assert products((0, 1)) == 4


@pytest.mark.parametrize("shape", [None, (2, 2, 1, 2)], ids=str)
def test_the_top_k_of_a_teacher(shape):
    hidden, head, tokens, weights = problem()
    head /= 2
    rng = np.random.default_rng(3)
    logits = jnp.asarray(2 * rng.normal(size=(ROWS, LENGTH, VOCAB)), jnp.float32)
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits), 5)

    def score(h, w):
        how = Scoring(divergence=SparseDivergence(2.0), chunk=CHUNK)
        derivative = LossDerivative(jax.grad(mixed), weights, 7.0)
        of, mesh = Head(w.T, VOCAB), shape and make_mesh(*shape)
        return token_scores(
            h, of, Targets(tokens, weights), how, teacher=TopK(ids, logps), loss_derivative=derivative, mesh=mesh
        )

    def expected(h, w):
        student = logits_of(h, w[:VOCAB])
        log_p = jax.nn.log_softmax(student / 2)
        q, p = jnp.exp(logps)[:, 1:], jnp.take_along_axis(jnp.exp(log_p), ids[:, 1:], 2)
        p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        divergence = (q * jnp.log(q / p)).sum(-1)
        logp = jnp.take_along_axis(jax.nn.log_softmax(student), tokens[:, 1:, None], 2)[..., 0]
        padded = (jnp.pad(jnp.where(weights[:, 1:] != 0, x, 0), ((0, 0), (1, 0))) for x in (logp, divergence))
        return Scores(**dict(zip(("logp", "divergence"), padded, strict=True)))

    scores = jax.jit(score)(hidden, head)
    student = np.asarray(logits_of(hidden, head[:VOCAB]), np.float64)
    wanted = sparse_formula(student / 2, np.asarray(logits[:, 1:], np.float64), 5)
    scored = np.asarray(weights[:, 1:]) != 0
    np.testing.assert_allclose(np.asarray(scores.divergence)[:, 1:][scored], wanted[scored], rtol=1e-4)
    gradients = (jax.jit(jax.grad(lambda h, w, f=f: mixed(f(h, w), weights, 7.0), (0, 1))) for f in (score, expected))
    assert_close(*(gradient(hidden, head) for gradient in gradients), 2e-5)


def test_the_teacher_has_no_gradient():
    hidden, head, tokens, weights = problem()
    teacher = teacher_of(False)

    def loss(teacher_hidden, teacher_weight):
        head_of_teacher = Head(teacher_weight, TEACHER_VOCAB, softcap=5.0)
        scores = token_scores(
            hidden,
            Head(head.T, VOCAB),
            Targets(tokens, weights),
            Scoring(divergence=KINDS[0], chunk=CHUNK),
            teacher=Teacher(teacher_hidden, head_of_teacher),
        )
        return jnp.sum(scores.divergence)

    gradients = jax.grad(loss, (0, 1))(teacher.hidden, teacher.head.weight)
    assert not any(g.any() for g in gradients)


def test_supports_of_filtered_sampling_are_refused():
    hidden, head, tokens, weights = problem()
    targets = Targets(tokens, weights, tokens[..., None])
    with pytest.raises(ValueError, match="supports"):
        token_scores(hidden, Head(head.T, VOCAB), targets, Scoring(divergence=KINDS[0]), teacher=teacher_of(False))


def test_bfloat16_follows_float32():
    of = KINDS[0]
    hidden, head, tokens, weights = problem(dtype="bfloat16")
    score = scorer(of, tokens, weights)
    gradient = jax.jit(jax.grad(lambda h, w: mixed(score(h, w), weights, 7.0), (0, 1)))(hidden, head)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)

    def wanted(h, w):
        logp, divergence = naive(of, h, w, tokens, weights)
        return mixed(Scores(logp=logp, divergence=divergence), weights, 7.0)

    expected = jax.grad(wanted, (0, 1))(hidden.astype(jnp.float32), rounded)
    assert gradient[0].dtype == jnp.bfloat16 and gradient[1].dtype == jnp.float32
    for actual, each in zip(gradient, expected, strict=True):
        error = jnp.linalg.norm(actual.astype(jnp.float32) - each) / jnp.linalg.norm(each)
        assert error < 2**-6, error


@pytest.mark.parametrize("of", KINDS[:3], ids=str)
def test_temporaries_are_a_fraction_of_the_naive_heads(of):
    """Compiled, not run: T = 4096, V = 128k."""
    length, width, vocab = 4096, 512, 128 * 1024
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, length, width), (width, vocab)))
    tokens, weights = (jax.ShapeDtypeStruct((1, length), dtype) for dtype in (jnp.int32, jnp.float32))

    def chunked(hidden, head, tokens, weights, teacher_hidden, teacher_head):
        assumed = LossDerivative(lambda scores, rows, shared: Scores(logp=0 * rows, divergence=rows), weights, None)
        teacher = Teacher(teacher_hidden, Head(teacher_head, vocab))
        of_student, targets = Head(head, vocab), Targets(tokens, weights)
        how = Scoring(divergence=of)
        scores = token_scores(hidden, of_student, targets, how, teacher=teacher, loss_derivative=assumed)
        return jnp.sum(scores.divergence * weights)

    def whole(hidden, head, tokens, weights, teacher_hidden, teacher_head):
        log_p, log_q = (
            jax.nn.log_softmax(jnp.einsum("btd,dv->btv", h[:, :-1], w))
            for h, w in ((hidden, head), (teacher_hidden, teacher_head))
        )
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        if of.kind == "jsd":
            log_m = jnp.logaddexp(log_p + jnp.log1p(-of.beta), log_q + jnp.log(of.beta))
            terms = of.beta * q * (log_q - log_m) + (1 - of.beta) * p * (log_p - log_m)
        else:
            terms = q * (log_q - log_p) if of.kind == "forward_kl" else p * (log_p - log_q)
        return jnp.sum(terms.sum(-1) * weights[:, 1:])

    def temporaries(loss):
        arguments = (hidden, head, tokens, weights, hidden, head)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(chunked) < 0.12 * temporaries(whole)
