"""Importance weights: bounded, of tokens or samples, and what is measured of them."""

import numpy as np
import policy_samples
import pytest
from policy_samples import check_loss_and_gradient, clipped, each, run

from jaxtrain.objectives.importance import Correction
from jaxtrain.objectives.policies import ClippedPolicy


@pytest.fixture(scope="module")
def problem():
    return policy_samples.problem()


def corrected(level, mode, cap, floor):
    def value(new, old, ref, sampler, A):
        tokens = []
        for n, o, s, a in each(new, old, sampler, A):
            w = np.exp(o - s) if level == "token" else np.full(len(o), np.prod(np.exp(o) / np.exp(s)))
            inside = (w <= cap) & (w >= floor)
            w = np.minimum(np.maximum(w, floor), cap) if mode == "truncate" else np.where(inside, w, 0)
            tokens.append(w * clipped(np.exp(n - o), a, 0.2, 0.2))
        return -np.concatenate(tokens).mean()

    return value


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_loss_is_weighted_by_the_bounded_ratio_to_the_sampler(problem, level, mode):
    objective = ClippedPolicy(correction=Correction(level, mode, cap=1.2, floor=0.8))
    check_loss_and_gradient(problem, objective, corrected(level, mode, 1.2, 0.8))


def test_the_gap_between_sampler_and_trainer_is_measured(problem):
    batch, (_, old, _, sampler), _ = problem
    _, metrics, _ = run(batch, ClippedPolicy(correction=Correction(cap=1.2)))
    delta = np.concatenate(old) - np.concatenate(sampler)
    expected = {
        "sampling/sampling_logp_difference/mean": np.abs(delta).mean(),
        "sampling/sampling_logp_difference/max": np.abs(delta).max(),
        "sampling/k1": -delta.mean(),
        "sampling/k3": (np.exp(delta) - delta - 1).mean(),
        "sampling/share_above_0.1": (np.abs(delta) > 0.1).mean(),
        "sampling/token_mult_prob_error": np.exp(np.abs(delta)).mean(),
        "sampling/importance_sampling_ratio/min": np.exp(delta).min(),
        "sampling/importance_sampling_ratio/max": 1.2,
    }
    for name, value in expected.items():
        assert float(metrics[name].value) == pytest.approx(value, rel=1e-4), name


def test_at_the_level_of_samples_the_weights_metrics_are_of_samples(problem):
    batch, (_, old, _, sampler), _ = problem
    _, metrics, _ = run(batch, ClippedPolicy(correction=Correction("sequence", cap=100.0)))
    weights = np.array([np.exp(np.sum(o - s)) for o, s in each(old, sampler)])
    for name, value in {"min": weights.min(), "mean": weights.mean(), "max": weights.max()}.items():
        assert float(metrics[f"sampling/importance_sampling_ratio/{name}"].value) == pytest.approx(value, rel=1e-4)
