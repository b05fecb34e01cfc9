"""Each policy objective against the formula of its paper, written down in numpy sample by sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.objectives.objective import Entropy, Logp
from jaxtrain.objectives.policies import CISPO, DAPO, GRPO, GSPO, ClippedPolicy, DrGRPO
from jaxtrain.objectives.policy import Correction
from jaxtrain.rl.algorithms import ALGORITHMS
from jaxtrain.rl.rollouts import pack
from jaxtrain.train.step import add_metrics, batch_norm
from jaxtrain.types import Batch, Scores

LENGTHS = [3, 7, 5, 1, 6, 4]


@pytest.fixture(scope="module")
def problem():
    """Six samples in two packed rows; one has an environment's tokens in its middle."""
    rng = np.random.default_rng(0)
    trajectories = [trajectory(2, n, sample=i) for i, n in enumerate(LENGTHS)]
    trajectories[1] = trajectories[1]._replace(loss_mask=np.array([1, 1, 0, 0, 1, 1, 1], bool))
    old = [t.sampler_logps + rng.normal(0, 0.3, n).astype(np.float32) for t, n in each(trajectories, LENGTHS)]
    new = [o + rng.normal(0, 0.3, len(o)).astype(np.float32) for o in old]
    ref = [o + rng.normal(0, 0.3, len(o)).astype(np.float32) for o in old]
    advantages = [np.full(n, a, np.float32) for n, a in each(LENGTHS, [1.0, -0.5, 2.0, -1.5, 0.7, -2.0])]
    packed = pack(trajectories, 24, rows=2)
    packed = packed.spread(old_logps=old, ref_logps=ref, advantages=advantages, new=new)
    masks = [t.loss_mask for t in trajectories]
    sampler = [t.sampler_logps for t in trajectories]
    own = [
        [values[mask].astype(np.float64) for values, mask in each(column, masks)] for column in (new, old, ref, sampler)
    ]
    return packed.batch, own, np.array([a[0] for a in advantages], np.float64)


def each(*columns):
    return zip(*columns, strict=True)


def run(batch, objective, drop=()):
    signals = {name: value for name, value in batch.signals.items() if name not in drop}
    batch = batch._replace(signals=signals)

    def of(logp):
        scored = jnp.where(batch.loss_weights > 0, logp, 0)
        return objective(Scores(scored, -scored, scored), batch, batch_norm(batch))

    (value, metrics), gradient = jax.value_and_grad(of, has_aux=True)(jnp.asarray(batch.signals["new"]))
    return float(value), metrics, np.asarray(gradient)


CORRECTIONS = [None, Correction("token"), Correction("token", "mask"), Correction("sequence")]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_loss_says_rightly_whether_a_token_sees_its_own_log_probability_alone(problem, name, correction):
    """On policy, where the old policy is the present one, and off."""
    batch, _, _ = problem
    objective = replace(ALGORITHMS[name].objective, correction=correction, max_completion_length=8)
    other = np.arange(batch.tokens.shape[1]) % 2 == 1
    changed = batch._replace(signals={**batch.signals, "new": np.where(other, 0, batch.signals["new"])})
    alone = True
    for drop in [(), ("old_logps",)]:
        gradient, beside = (run(each, objective, drop)[2] for each in (batch, changed))
        alone &= np.allclose(gradient[:, ~other], beside[:, ~other], rtol=1e-5, atol=1e-7)
    assert alone == objective.separable


def clipped(ratio, advantage, low, high):
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def grpo(new, old, ref, sampler, A):
    """1/G sum 1/|o| sum [min(r A, clip(r) A) - beta (pi_ref/pi - log(pi_ref/pi) - 1)]."""
    samples = []
    for n, o, f, a in each(new, old, ref, A):
        kl = np.exp(f - n) - (f - n) - 1
        samples.append(np.mean(clipped(np.exp(n - o), a, 0.2, 0.2) - 0.04 * kl))
    return -np.mean(samples)


def dr_grpo(new, old, ref, sampler, A):
    sums = [np.sum(clipped(np.exp(n - o), a, 0.2, 0.2)) for n, o, a in each(new, old, A)]
    return -np.mean(sums) / 16


def dapo(new, old, ref, sampler, A):
    tokens = np.concatenate([clipped(np.exp(n - o), a, 0.2, 0.28) for n, o, a in each(new, old, A)])
    return -tokens.sum() / len(tokens)


def gspo(new, old, ref, sampler, A):
    """s = (pi(y|x) / pi_old(y|x)) ** (1/|y|)."""
    samples = [
        clipped((np.exp(n.sum()) / np.exp(o.sum())) ** (1 / len(n)), a, 0.03, 0.04) for n, o, a in each(new, old, A)
    ]
    return -np.mean(samples)


def dual(new, old, ref, sampler, A):
    """max(min(r A, clip(r) A), c A) where A < 0."""
    tokens = []
    for n, o, a in each(new, old, A):
        inner = clipped(np.exp(n - o), a, 0.2, 0.2)
        tokens.append(np.maximum(inner, 1.1 * a) if a < 0 else inner)
    return -np.concatenate(tokens).mean()


def cispo_value(new, old, ref, sampler, A):
    """sum over all tokens of sg(min(r, 1 + eps_high)) A log pi, over their number."""
    tokens = [np.minimum(np.exp(n - o), 1.2) * a * n for n, o, a in each(new, old, A)]
    return -np.concatenate(tokens).mean()


def corrected(level, mode, cap):
    def value(new, old, ref, sampler, A):
        tokens = []
        for n, o, s, a in each(new, old, sampler, A):
            w = np.exp(o - s) if level == "token" else np.full(len(o), np.prod(np.exp(o) / np.exp(s)))
            w = np.minimum(w, cap) if mode == "truncate" else np.where(w <= cap, w, 0)
            tokens.append(w * clipped(np.exp(n - o), a, 0.2, 0.2))
        return -np.concatenate(tokens).mean()

    return value


def kl_only(formula, ratio=lambda n, o: 1.0):
    def value(new, old, ref, sampler, A):
        tokens = [ratio(n, o) * formula(n, f) for n, o, f in each(new, old, ref)]
        surrogates = [clipped(np.exp(n - o), a, 0.2, 0.2) for n, o, a in each(new, old, A)]
        return -np.concatenate(surrogates).mean() + 0.5 * np.concatenate(tokens).mean()

    return value


CASES = {
    "grpo": (GRPO(beta=0.04), grpo),
    "dr_grpo": (DrGRPO(max_completion_length=16), dr_grpo),
    "dapo": (DAPO(), dapo),
    "gspo": (GSPO(epsilon_low=0.03, epsilon_high=0.04), gspo),
    "dual clip": (ClippedPolicy(dual_clip=1.1), dual),
    "cispo": (CISPO(epsilon_high=0.2), cispo_value),
    "k1 times the ratio": (
        ClippedPolicy(beta=0.5, kl="k1", kl_bias_correction=True),
        kl_only(lambda p, q: p - q, lambda n, o: np.exp(n) / np.exp(o)),
    ),
    "k3 times the ratio": (
        ClippedPolicy(beta=0.5, kl="k3", kl_bias_correction=True),
        kl_only(lambda p, q: np.exp(q) / np.exp(p) - (q - p) - 1, lambda n, o: np.exp(n) / np.exp(o)),
    ),
    "k2": (ClippedPolicy(beta=0.5, kl="k2"), kl_only(lambda p, q: (p - q) ** 2 / 2)),
    "k3": (
        ClippedPolicy(beta=0.5, kl="k3"),
        kl_only(lambda p, q: np.exp(q) / np.exp(p) - (q - p) - 1),
    ),
} | {
    f"{level} {mode}": (ClippedPolicy(correction=Correction(level, mode, 1.2)), corrected(level, mode, 1.2))
    for level in ("token", "sequence")
    for mode in ("truncate", "mask")
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_papers(problem, name):
    """The gradient too, by differences of the paper's formula: where CISPO stops one, the factor is held."""
    batch, (new, old, ref, sampler), advantages = problem
    objective, formula = CASES[name]
    value, _, gradient = run(batch, objective)
    assert value == pytest.approx(formula(new, old, ref, sampler, advantages), rel=2e-5)
    # The first token of every sample that has one, in the order of the samples.
    for index in range(len(new)):

        def moved(step, index=index):
            shifted = [n.copy() for n in new]
            shifted[index][0] += step
            if name == "cispo":  # the ratio is a constant
                bounded = min(np.exp(new[index][0] - old[index][0]), 1.2)
                return -bounded * advantages[index] * shifted[index][0] / sum(map(len, new))
            return formula(shifted, old, ref, sampler, advantages)

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        row, column = np.argwhere(np.isclose(batch.signals["new"], new[index][0], atol=0))[0]
        assert gradient[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert not gradient[batch.loss_weights == 0].any()


@pytest.mark.parametrize(
    ("kind", "bias_correction", "of"),
    [("k2", False, "reverse"), ("k3", False, "forward"), ("k1", True, "reverse"), ("k3", True, "reverse")],
)
def test_the_expected_gradient_of_a_kl_in_the_loss(kind, bias_correction, of):
    """Over all tokens of a vocabulary, each weighed by its probability: `reverse` is KL(policy || reference)."""
    rng = np.random.default_rng(0)
    z, ref = jnp.asarray(rng.normal(size=7)), jax.nn.log_softmax(jnp.asarray(rng.normal(size=7)))
    p = jax.nn.softmax(z)
    row = np.zeros((1, 7), np.int32)
    signals = {"advantages": np.zeros((1, 7)), "sampler_logps": jnp.log(p)[None], "ref_logps": ref[None]}
    batch = Batch(row, row, row + 1, p[None], signals)  # the weights are the probabilities, which sum to 1
    objective = ClippedPolicy(beta=1.0, kl=kind, kl_bias_correction=bias_correction)

    def estimated(z):
        logp = jax.nn.log_softmax(z)[None]
        return objective(Scores(logp, logp, logp), batch, batch_norm(batch))[0]

    def divergence(z):
        logp = jax.nn.log_softmax(z)
        return jnp.sum(jnp.exp(logp) * (logp - ref)) if of == "reverse" else jnp.sum(jnp.exp(ref) * (ref - logp))

    np.testing.assert_allclose(jax.grad(estimated)(z), jax.grad(divergence)(z), atol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip=1.0 must be more than 1"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be more than 1"),
        ({"beta": 0.1, "kl": "k1"}, "expected gradient of 0"),
        ({"beta": 0.1, "kl": "k2", "kl_bias_correction": True}, "for k1 and k3"),
    ],
)
def test_numbers_under_which_nothing_is_learned_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        ClippedPolicy(**numbers)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(problem):
    """RLOO's form: the gradient of -mean over samples of A log p(y|x)."""
    batch, (new, *_), _ = problem
    _, metrics, gradient = run(batch, ClippedPolicy(aggregation="sum"), drop=("old_logps",))
    expected = -batch.signals["advantages"] * batch.loss_weights / len(new)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert float(metrics["clip_ratio/region_mean"].value) == 0


@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo", "bnpo", "sum"])
def test_microbatches_add_up_to_the_batch(problem, aggregation):
    batch, *_ = problem
    correction = Correction("sequence")
    numbers = {"epsilon_low": 0.1, "epsilon_high": 0.1, "level": "sequence", "beta": 0.1}
    objective = ClippedPolicy(aggregation=aggregation, correction=correction, entropy_coefficient=0.1, **numbers)
    norm = batch_norm(batch)

    def of(rows):
        part = jax.tree.map(lambda leaf: leaf[rows], batch)
        return objective(Scores(part.signals["new"], part.signals["new"], part.tokens), part, norm)

    whole, metrics = of(slice(None))
    (one, first), (other, second) = of(slice(0, 1)), of(slice(1, 2))
    assert float(one + other) == pytest.approx(float(whole), rel=1e-5)
    together = add_metrics(first, second)
    for name in metrics.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}:
        assert float(together[name].value) == pytest.approx(float(metrics[name].value), rel=1e-5), name
    lows = [float(part["clip_ratio/low_mean"].value) for part in (first, second)]
    assert float(together["clip_ratio/low_min"].value) == min(lows)


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


def test_a_policy_far_away_gives_no_nan(problem):
    batch, *_ = problem
    signals = dict(batch.signals)
    signals |= {"new": signals["new"] + 200, "old_logps": signals["old_logps"] - 200}
    far = batch._replace(signals=signals)
    value, _, gradient = run(far, ClippedPolicy())
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("target", [None, 2.0])
def test_the_entropy_bonus_is_aggregated_as_the_loss_is(problem, target):
    """With a target the coefficient is a signal: that of the step's samples."""
    batch, *_ = problem
    rng = np.random.default_rng(2)
    entropy = jnp.asarray(rng.random(batch.tokens.shape), jnp.float32) * (batch.loss_weights > 0)
    plain, objective = GRPO(), GRPO(entropy_coefficient=0.1, entropy_target=target)
    coefficient = objective.coefficient_at(0.5)
    assert coefficient == pytest.approx(0.1 if target is None else 0.075)
    if target is not None:
        full = np.full(batch.tokens.shape, coefficient, np.float32)
        batch = batch._replace(signals={**batch.signals, "entropy_coefficients": full})
        assert objective.coefficient_at(2.5) == 0
    scores = Scores(jnp.asarray(batch.signals["new"]), entropy, entropy)
    norm = batch_norm(batch)
    without, bonus = (of(scores, batch, norm)[0] for of in (plain, objective))
    segments = []
    for row in range(2):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            mask = np.zeros(batch.tokens.shape, bool)
            mask[row] = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0)
            segments.append(mask)
    expected = np.mean([np.asarray(entropy)[mask].mean() for mask in segments])
    assert float(without - bonus) == pytest.approx(coefficient * expected, rel=1e-4)
    gradient = jax.grad(lambda h: objective(scores._replace(entropy=h), batch, norm)[0])(entropy)
    assert np.all(np.asarray(gradient)[batch.loss_weights > 0] < 0)


def test_an_entropy_target_needs_a_coefficient():
    with pytest.raises(ValueError, match="needs an entropy_coefficient"):
        GRPO(entropy_target=1.0)


def test_what_an_objective_asks_for_follows_from_its_numbers():
    assert GRPO().signals == ("advantages", "sampler_logps")
    assert GRPO(beta=0.1).signals == ("advantages", "sampler_logps", "ref_logps")
    assert GRPO(beta=0.1, kl_in="reward").signals == ("advantages", "sampler_logps")
    assert GRPO(temperature=0.7).needs == (Logp(0.7), Entropy())
    assert GRPO(entropy_coefficient=0.1).needs == (Logp(), Entropy(differentiable=True))
