import jax
import jax.numpy as jnp
import numpy as np
import pytest
from divergences import KINDS, formula, softmax, sparse_formula

from jaxtrain.objectives.objective import Divergence, SparseDivergence
from jaxtrain.ops.divergence import UNKNOWN, divergence_derivative, divergence_stats

C, V = 5, 12
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (3 * RNG.normal(size=(C, V)) for _ in range(2))


def stats(of, z, t):
    return divergence_stats(of, jnp.asarray(z, jnp.float32), jnp.asarray(t, jnp.float32), lambda reduce, x: x)


def derivative_of(value):
    """Of a function of the student's logits [C, V] -> [C], by central differences."""
    step = 1e-5 * np.eye(V)
    return np.stack([(value(STUDENT + moved) - value(STUDENT - moved)) / 2e-5 for moved in step], -1)


@pytest.mark.parametrize("of", KINDS, ids=str)
def test_value_and_derivative_are_those_of_the_paper(of):
    found = stats(of, STUDENT, TEACHER)
    np.testing.assert_allclose(found.value, formula(of, STUDENT, TEACHER), rtol=1e-5)
    numeric = derivative_of(lambda z: formula(of, z, TEACHER))
    derivative = divergence_derivative(of, jnp.float32(STUDENT), jnp.float32(TEACHER), found)
    np.testing.assert_allclose(derivative, numeric, atol=1e-5)


@pytest.mark.parametrize("of", KINDS, ids=str)
def test_columns_without_probability_add_nothing(of):
    """As the padded ones are masked."""
    z, t = (np.pad(x, ((0, 0), (0, 3)), constant_values=-1e30) for x in (STUDENT, TEACHER))
    found = stats(of, z, t)
    np.testing.assert_allclose(found.value, stats(of, STUDENT, TEACHER).value, rtol=1e-6)
    derivative = divergence_derivative(of, jnp.float32(z), jnp.float32(t), found)
    assert bool(jnp.isfinite(derivative).all()) and not derivative[:, V:].any()


@pytest.mark.parametrize("of", KINDS, ids=str)
def test_equal_distributions_have_no_divergence_and_no_gradient(of):
    found = stats(of, STUDENT, STUDENT + 2)
    np.testing.assert_allclose(found.value, 0, atol=1e-6)
    derivative = divergence_derivative(of, jnp.float32(STUDENT), jnp.float32(STUDENT + 2), found)
    np.testing.assert_allclose(derivative, 0, atol=1e-6)


def test_the_ends_of_jsd_are_refused():
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="forward_kl"):
            Divergence("jsd", beta)


def test_the_derivative_agrees_with_automatic_differentiation():
    for of in KINDS:
        gradient = jax.grad(lambda z, of=of: stats(of, z, TEACHER).value.sum())(jnp.float32(STUDENT))
        found = divergence_derivative(of, jnp.float32(STUDENT), jnp.float32(TEACHER), stats(of, STUDENT, TEACHER))
        np.testing.assert_allclose(found, gradient, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_the_rest_of_the_vocabulary_is_one_bucket(k):
    teacher = softmax(TEACHER)
    known = teacher >= np.sort(teacher, -1)[:, [-k]]
    t = np.where(known, np.log(teacher), UNKNOWN)
    found = stats(SparseDivergence(), STUDENT, t)
    np.testing.assert_allclose(found.value, sparse_formula(STUDENT, TEACHER, k), rtol=1e-5)
    derivative = divergence_derivative(SparseDivergence(), jnp.float32(STUDENT), jnp.float32(t), found)
    np.testing.assert_allclose(derivative, derivative_of(lambda z: sparse_formula(z, TEACHER, k)), atol=1e-5)


def test_a_rest_without_probability_is_finite():
    t = np.full((C, V), UNKNOWN)
    t[:, :2] = np.log([0.75, 0.25])  # q of the rest is 0, and p nearly
    z = np.where(np.arange(V) < 2, 0.0, -200.0) * np.ones((C, 1))
    found = stats(SparseDivergence(), z, t)
    derivative = divergence_derivative(SparseDivergence(), jnp.float32(z), jnp.float32(t), found)
    np.testing.assert_allclose(found.value, 0.75 * np.log(1.5) + 0.25 * np.log(0.5), atol=1e-4)
    assert bool(jnp.isfinite(found.value).all() & jnp.isfinite(derivative).all())
