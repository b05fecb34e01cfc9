"""Compares the sampling distribution with numpy, and samples with the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.sample.constraints import FORBIDDEN, GENERATED, IN_PROMPT, advance, constrain, join_tries
from jaxtrain.sample.filters import draw
from jaxtrain.sample.samples import default_settings
from jaxtrain.sample.trie import Trie

VOCAB = 200  # more than the candidates that thresholds are looked for among first
LOGITS = np.random.default_rng(0).normal(size=(1, VOCAB)).astype(np.float32) * 2
DRAWS = 4096
drawn = jax.jit(lambda *arguments: draw(*arguments)[0], static_argnums=6)


def settings_of(rows, **values):
    settings = default_settings(rows)
    for name, value in {"temperature": 1.0, "want_logps": True, **values}.items():
        getattr(settings, name)[:] = value
    return settings


def draws(support=0, **values):
    logits = jnp.asarray(np.repeat(LOGITS, DRAWS, 0))
    every = jnp.ones(DRAWS, bool)
    return drawn(logits, logits, settings_of(DRAWS, **values), jnp.arange(DRAWS), every, ~every, support)


def distribution(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities [V] after transformers' warpers, in their order."""
    p = np.exp(LOGITS[0].astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 120, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_filtered_distribution_and_return_its_log_probability(options):
    expected = distribution(**options)
    got = draws(**options)
    np.testing.assert_allclose(got.logps, np.log(expected[got.tokens]), atol=2e-5)
    plain = distribution()
    np.testing.assert_allclose(got.raw_logps, np.log(plain[got.tokens]), atol=2e-5)
    counts = np.bincount(got.tokens, minlength=VOCAB)
    likely = expected * DRAWS > 5
    chi2 = ((counts - expected * DRAWS)[likely] ** 2 / (expected * DRAWS)[likely]).sum()
    degrees = likely.sum()
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)  # five standard deviations


def test_a_support_lists_the_kept_tokens_and_limits_their_number():
    expected = distribution(top_k=14, top_p=0.8)
    got = draws(16, top_k=14, top_p=0.8)
    kept = got.supports[0][got.supports[0] >= 0]
    assert set(kept.tolist()) == set(np.flatnonzero(expected).tolist()) and 1 < len(kept) < 14
    np.testing.assert_allclose(got.logps, np.log(expected[got.tokens]), atol=2e-5)
    bounded = draws(4, top_p=0.8)
    best = np.argsort(-LOGITS[0])[:4]
    assert bounded.supports[0].tolist() == best.tolist()
    np.testing.assert_allclose(
        bounded.logps, LOGITS[0][bounded.tokens] - np.log(np.exp(LOGITS[0][best]).sum()), atol=2e-5
    )
    assert (draws(4).supports == -1).all()


TIED = np.floor(np.random.default_rng(1).normal(size=(1, VOCAB)) * 2).astype(np.float32)  # few values, so many ties
TRUNCATIONS = [
    {"top_k": 5},
    {"top_k": 50},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 150},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 150, "top_p": 0.9},
    {"top_k": 150, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("flat", [False, True], ids=["tied", "all alike"])
@pytest.mark.parametrize("options", TRUNCATIONS, ids=str)
def test_ties_are_broken_by_the_lower_id_with_and_without_a_support(options, flat):
    logits = np.zeros_like(TIED) if flat else TIED
    p = np.exp(logits[0].astype(np.float64))
    order = np.argsort(-p, kind="stable")
    kept = order[: options.get("top_k") or VOCAB]
    share = np.cumsum(p[kept]) / p[kept].sum()
    # Sums of many equal terms are not those of float32 to the last bit.
    kept = kept[np.append(0, share[:-1]) < options.get("top_p", 1.0) - 1e-6]
    kept = kept[p[kept] >= options.get("min_p", 0.0) * p.max()]
    rows = jnp.asarray(np.repeat(logits, 64, 0))
    every = jnp.ones(64, bool)
    where = jnp.arange(64)
    exact = drawn(rows, rows, settings_of(64, **options), where, every, ~every, 0)
    listed = drawn(rows, rows, settings_of(64, **options), where, every, ~every, VOCAB)
    assert set(listed.supports[0].tolist()) - {-1} == set(kept.tolist())
    expected = np.log(p / p[kept].sum())
    for got in (exact, listed):
        assert set(got.tokens.tolist()) <= set(kept.tolist())
        np.testing.assert_allclose(got.logps, expected[got.tokens], atol=2e-5)
    np.testing.assert_array_equal(exact.tokens, listed.tokens)


def test_zero_temperature_is_greedy_with_any_filters():
    got = draws(temperature=0, top_k=7, top_p=0.5, min_p=0.2)
    assert (got.tokens == LOGITS[0].argmax()).all() and not got.logps.any()


def test_a_sampled_token_depends_only_on_seed_sample_and_position():
    whole = draws(seed=9)
    logits = jnp.asarray(np.repeat(LOGITS, 3, 0))
    every = jnp.ones(3, bool)
    where = jnp.array([77, 5, 4000])
    got = drawn(logits, logits, settings_of(3, seed=9), where, every, ~every, 0)
    assert got.tokens.tolist() == whole.tokens[where].tolist()
    assert (draws(seed=10).tokens != whole.tokens).mean() > 0.3
    assert (draws(seed=9, sample=1).tokens != whole.tokens).mean() > 0.3


def test_penalties_biases_and_masks():
    rows = np.repeat(LOGITS, 3, 0)
    marks = np.zeros((3, VOCAB), np.uint16)
    marks[:, 3], marks[:, 4], marks[:, 5] = IN_PROMPT, 3 * GENERATED, FORBIDDEN
    settings = settings_of(3, repetition=1.5, presence=0.7, frequency=0.2, marked=[True, True, False])
    settings.bias_ids[1, :2], settings.bias[1, :2] = [4, 9], [2.0, -100.0]
    tries = jax.device_put(join_tries([])[0])
    live = jnp.array([True] * 3)
    out = np.asarray(constrain(jnp.asarray(rows), settings, jnp.asarray(marks), tries, jnp.zeros(3, jnp.int32), live))
    expected = rows.copy()
    for token in (3, 4):
        value = rows[0, token]
        expected[:2, token] = value / 1.5 if value > 0 else value * 1.5
    expected[:2, 4] -= 0.7 + 3 * 0.2
    expected[1, 4] += 2
    expected[1, 9] -= 100
    expected[:2, 5] = -np.inf
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_trie_allows_only_its_next_tokens_and_ends_with_its_sequences():
    first, second = Trie([[7, 8], [7, 9, 1]]), Trie([[3]])
    tries, roots = join_tries([first, second])
    tries = jax.device_put(tries)
    node = jnp.array([roots[0], roots[1], 0])
    every = jnp.ones(3, bool)
    rows = jnp.asarray(np.repeat(LOGITS, 3, 0))
    out = np.asarray(constrain(rows, settings_of(3), jnp.zeros((3, VOCAB), jnp.uint16), tries, node, every))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in out] == [[7], [3], list(range(VOCAB))]
    node, ended = advance(tries, node, jnp.array([7, 3, 50]))
    assert ended.tolist() == [False, True, False] and node[2] == 0
    out = np.asarray(constrain(rows, settings_of(3), jnp.zeros((3, VOCAB), jnp.uint16), tries, node, every))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [8, 9]
    for token, ends in ((8, True), (9, False)):
        assert advance(tries, node, jnp.array([token, 0, 0]))[1].tolist()[0] == ends
