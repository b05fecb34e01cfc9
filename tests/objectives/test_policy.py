"""Each policy objective against the formula of its paper, written down in numpy sample by sample."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import policy_samples
import pytest
from policy_samples import check_loss_and_gradient, clipped, each, run

from jaxtrain.objectives.importance import Correction
from jaxtrain.objectives.objective import Entropy, Logp
from jaxtrain.objectives.policies import CISPO, DAPO, GRPO, GSPO, RLOO, SAPO, VESPO, ClippedPolicy, DrGRPO
from jaxtrain.rl.algorithms import ALGORITHMS
from jaxtrain.train.step import add_metrics, add_signals, batch_norm
from jaxtrain.types import Batch, Scores


@pytest.fixture(scope="module")
def problem():
    return policy_samples.problem()


CORRECTIONS = [None, Correction("token"), Correction("token", "mask"), Correction("sequence")]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize(
    "name", [name for name, row in ALGORITHMS.items() if row.advantages]
)  # the others are divergences
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


def rloo(new, old, ref, sampler, A):
    """One action is the whole sample: R = pi(y|x) / pi_old(y|x)."""
    samples = [clipped(np.exp(n.sum()) / np.exp(o.sum()), a, 0.2, 0.3) for n, o, a in each(new, old, A)]
    return -np.mean(samples)


def luspo(new, old, ref, sampler, A):
    """GSPO times the length of the sample."""
    samples = [
        len(n) * clipped((np.exp(n.sum()) / np.exp(o.sum())) ** (1 / len(n)), a, 0.03, 0.04)
        for n, o, a in each(new, old, A)
    ]
    return -np.mean(samples)


def sapo(new, old, ref, sampler, A):
    """f(r) = sigmoid(tau (r - 1)) 4 / tau, with tau by the sign of the advantage."""
    samples = []
    for n, o, a in each(new, old, A):
        tau = 1.0 if a > 0 else 1.05
        samples.append(np.mean(4 / tau / (1 + np.exp(-tau * (np.exp(n - o) - 1))) * a))
    return -np.mean(samples)


def cispo_value(new, old, ref, sampler, A, held=None):
    """sum over all tokens of sg(min(r, 1 + eps_high)) A log pi, over their number."""
    tokens = [np.minimum(np.exp(h - o), 1.2) * a * n for n, o, a, h in each(new, old, A, held or new)]
    return -np.concatenate(tokens).mean()


def vespo_value(new, old, ref, sampler, A, held=None):
    """sum over all tokens of sg(phi(w)) A log pi, phi(w) = w^k exp(lambda (1 - w)), w = pi(y|x) / pi_sampler(y|x)."""
    tokens = []
    for n, s, a, h in each(new, sampler, A, held or new):
        (k, lam), w = ((2, 3) if a >= 0 else (3, 2)), np.exp(h.sum()) / np.exp(s.sum())
        tokens.append(w**k * np.exp(lam * (1 - w)) * a * n)
    return -np.concatenate(tokens).mean()


HELD = (cispo_value, vespo_value)  # whose weights have no gradient


def off_policy_masked(new, old, ref, sampler, A):
    """Drops samples of negative advantage with a mean log(pi_sampler / pi) of more than 0.05."""
    kept = [a >= 0 or np.mean(s - n) <= 0.05 for n, s, a in each(new, sampler, A)]
    assert not all(kept) and any(keep and a < 0 for keep, a in each(kept, A))
    tokens = [keep * clipped(np.exp(n - o), a, 0.2, 0.2) for n, o, a, keep in each(new, old, A, kept)]
    return -np.concatenate(tokens).mean()


def top_entropy(new, old, ref, sampler, A):
    """The quarter of the tokens with the highest entropy, which is -log pi here; the divisor is all tokens."""
    at_most = np.quantile(np.concatenate(new), 0.25)
    tokens = [np.where(n <= at_most, clipped(np.exp(n - o), a, 0.2, 0.2), 0) for n, o, a in each(new, old, A)]
    return -np.concatenate(tokens).mean()


def kl_only(formula, ratio=lambda n, o: 1.0):
    def value(new, old, ref, sampler, A):
        tokens = [ratio(n, o) * formula(n, f) for n, o, f in each(new, old, ref)]
        surrogates = [clipped(np.exp(n - o), a, 0.2, 0.2) for n, o, a in each(new, old, A)]
        return -np.concatenate(surrogates).mean() + 0.5 * np.concatenate(tokens).mean()

    return value


PAPERS = {  # none of which corrects for the sampler
    "grpo": (GRPO(beta=0.04, kl_bias_correction=False), grpo),
    "dr_grpo": (DrGRPO(max_completion_length=16), dr_grpo),
    "dapo": (DAPO(), dapo),
    "gspo": (GSPO(epsilon_low=0.03, epsilon_high=0.04), gspo),
    "dual clip": (ClippedPolicy(dual_clip=1.1), dual),
    "rloo": (RLOO(epsilon_high=0.3), rloo),
    "luspo": (GSPO(epsilon_low=0.03, epsilon_high=0.04, aggregation="sum"), luspo),
    "sapo": (SAPO(), sapo),
    "cispo": (CISPO(epsilon_high=0.2), cispo_value),
    "off-policy mask": (ClippedPolicy(off_policy_threshold=0.05), off_policy_masked),
    "top entropy": (ClippedPolicy(top_entropy=0.25), top_entropy),
    "k1 times the ratio": (
        ClippedPolicy(beta=0.5, kl="k1"),
        kl_only(lambda p, q: p - q, lambda n, o: np.exp(n) / np.exp(o)),
    ),
    "k3 times the ratio": (
        ClippedPolicy(beta=0.5, kl="k3"),
        kl_only(lambda p, q: np.exp(q) / np.exp(p) - (q - p) - 1, lambda n, o: np.exp(n) / np.exp(o)),
    ),
    "k2": (ClippedPolicy(beta=0.5, kl="k2", kl_bias_correction=False), kl_only(lambda p, q: (p - q) ** 2 / 2)),
    "k3": (
        ClippedPolicy(beta=0.5, kl="k3", kl_bias_correction=False),
        kl_only(lambda p, q: np.exp(q) / np.exp(p) - (q - p) - 1),
    ),
}
CASES = {name: (replace(objective, correction=None), formula) for name, (objective, formula) in PAPERS.items()}
CASES |= {
    f"vespo, {level}": (VESPO(correction=Correction(level, cap=1e9)), vespo_value) for level in ("token", "sequence")
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_papers(problem, name):
    objective, formula = CASES[name]
    check_loss_and_gradient(problem, objective, formula, held=formula in HELD)


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
    objective = ClippedPolicy(beta=1.0, kl=kind, kl_bias_correction=bias_correction, correction=None)

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
        ({"beta": 0.1, "kl": "k1", "kl_bias_correction": False}, "expected gradient of 0"),
        ({"beta": 0.1, "kl": "k2"}, "for k1 and k3"),
        ({"entropy_target": 1.0}, "needs an entropy_coefficient"),
    ],
)
def test_numbers_under_which_nothing_is_learned_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        ClippedPolicy(**numbers)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(problem):
    """RLOO's form: the gradient of -mean over samples of A log p(y|x)."""
    batch, (new, *_), _ = problem
    _, metrics, gradient = run(batch, ClippedPolicy(aggregation="sum", correction=None), drop=("old_logps",))
    expected = -batch.signals["advantages"] * batch.loss_weights / len(new)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert float(metrics["clip_ratio/region_mean"].value) == 0


BY_SAMPLE = {"beta": 0.1, "kl_in": "loss", "entropy_coefficient": 0.1, "correction": Correction("sequence")}
CLIPPED = ClippedPolicy(epsilon_low=0.1, epsilon_high=0.1, level="sequence", **BY_SAMPLE)
CUT = {f"clipped, {each}": replace(CLIPPED, aggregation=each) for each in ("grpo", "dr_grpo", "dapo", "bnpo", "sum")}
CUT |= {kind.__name__: kind(**BY_SAMPLE, off_policy_threshold=0.05) for kind in (RLOO, CISPO, SAPO, VESPO)}


@pytest.mark.parametrize("name", CUT)
def test_microbatches_add_up_to_the_batch(problem, name):
    batch, *_ = problem
    objective = CUT[name]
    batch = batch._replace(left_out=np.array([[5, 1, 1], [0, 0, 0]], np.float32))
    norm = batch_norm(batch)

    def of(rows):
        part = jax.tree.map(lambda leaf: leaf[rows], batch)
        return objective(Scores(part.signals["new"], part.signals["new"], part.tokens), part, norm)

    whole, metrics = of(slice(None))
    (one, first), (other, second) = of(slice(0, 1)), of(slice(1, 2))
    assert float(one + other) == pytest.approx(float(whole), rel=1e-5)
    together = add_metrics(first, second)
    for name in metrics:
        assert float(together[name].value) == pytest.approx(float(metrics[name].value), rel=1e-5), name


def test_the_samples_left_out_stay_in_every_divisor(problem):
    """4 of 16 samples without a reward leave the gradient of the others as it is, as in TRL; each is a sample of 0."""
    batch, (new, *_), _ = problem
    left_out = np.zeros((2, 3), np.float32)
    left_out[:, :] = [[9, 1, 1], [14, 2, 2]]
    counted = batch._replace(left_out=left_out)
    tokens = sum(map(len, new))
    for aggregation in ("grpo", "dr_grpo", "dapo", "sum"):
        objective = ClippedPolicy(aggregation=aggregation, correction=None, entropy_coefficient=0.0)
        (value, metrics, gradient), (_, _, alone) = run(counted, objective), run(batch, objective)
        share = tokens / (tokens + 23) if aggregation == "dapo" else 6 / 9
        np.testing.assert_allclose(gradient, share * alone, rtol=1e-5, atol=1e-9)
        assert float(metrics["loss"].value) == pytest.approx(value)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_extremes_of_the_clip_ratio_are_over_samples(problem, level):
    """And its means over tokens, or over samples where the ratio is a sample's."""
    batch, (new, old, *_), advantages = problem
    _, metrics, _ = run(batch, ClippedPolicy(epsilon_low=0.1, epsilon_high=0.1, level=level))
    ratios = [np.exp(n - o) if level == "token" else np.exp(np.mean(n - o, keepdims=True)) for n, o in each(new, old)]
    low = [(r < 0.9) & (a < 0) for r, a in each(ratios, advantages)]
    high = [(r > 1.1) & (a > 0) for r, a in each(ratios, advantages)]
    expected = {
        "low_mean": np.concatenate(low).mean(),
        "low_min": min(map(np.mean, low)),
        "high_mean": np.concatenate(high).mean(),
        "high_max": max(map(np.mean, high)),
        "region_mean": np.concatenate([*low, *high]).sum() / sum(map(len, low)),
    }
    assert expected["high_max"] > expected["high_mean"] > 0
    for name, value in expected.items():
        assert float(metrics[f"clip_ratio/{name}"].value) == pytest.approx(value, rel=1e-5), name


def test_a_policy_far_away_gives_no_nan(problem):
    batch, *_ = problem
    signals = dict(batch.signals)
    signals |= {"new": signals["new"] + 200, "old_logps": signals["old_logps"] - 200}
    far = batch._replace(signals=signals)
    value, _, gradient = run(far, ClippedPolicy())
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("target", [None, 2.0])
def test_the_entropy_bonus_is_a_mean_over_tokens_whatever_the_aggregation(problem, target):
    """With a target the coefficient is a signal: that of the step's samples."""
    batch, *_ = problem
    rng = np.random.default_rng(2)
    entropy = jnp.asarray(rng.random(batch.tokens.shape), jnp.float32) * (batch.loss_weights > 0)
    plain = GRPO(correction=None)
    objective = replace(plain, entropy_coefficient=0.1, entropy_target=target)
    coefficient = objective.coefficient_at(0.5, 0.0)
    assert coefficient == pytest.approx(0.1 if target is None else 0.075)
    if target is not None:
        full = np.full(batch.tokens.shape, coefficient, np.float32)
        batch = batch._replace(signals={**batch.signals, "entropy_coefficients": full})
        assert objective.coefficient_at(2.5, 0.0) == 0
    scores = Scores(jnp.asarray(batch.signals["new"]), entropy, entropy)
    norm = batch_norm(batch)
    without, bonus = (of(scores, batch, norm)[0] for of in (plain, objective))
    expected = np.asarray(entropy)[batch.loss_weights > 0].mean()
    assert float(without - bonus) == pytest.approx(coefficient * expected, rel=1e-4)
    gradient = jax.grad(lambda h: objective(scores._replace(entropy=h), batch, norm)[0])(entropy)
    assert np.all(np.asarray(gradient)[batch.loss_weights > 0] < 0)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_with_top_entropy_the_bonus_is_of_the_tokens_that_are_trained(problem, share):
    batch, *_ = problem
    entropy = np.random.default_rng(2).random(batch.tokens.shape).astype(np.float32) * (batch.loss_weights > 0)
    plain = GRPO(correction=None, top_entropy=share)
    objective = replace(plain, entropy_coefficient=0.1)
    scores = Scores(jnp.asarray(batch.signals["new"]), jnp.asarray(entropy), jnp.asarray(entropy))
    batch = add_signals(objective, lambda *needs: scores, batch)
    without, bonus = (of(scores, batch, batch_norm(batch))[0] for of in (plain, objective))
    own = entropy[batch.loss_weights > 0]
    kept = own[own >= np.quantile(own, 1 - share)]
    assert len(kept) == (1 if share == 0 else 7)
    assert float(without - bonus) == pytest.approx(0.1 * kept.mean(), rel=1e-4)


def test_what_an_objective_asks_for_follows_from_its_numbers():
    assert GRPO().signals == ("advantages", "sampler_logps")
    assert GRPO(beta=0.1).signals == ("advantages", "sampler_logps", "ref_logps")
    assert GRPO(beta=0.1, kl_in="reward").signals == ("advantages", "sampler_logps")
    assert GRPO(top_entropy=0.2).signals == ("advantages", "sampler_logps", "top_entropy")
    assert GRPO(temperature=0.7).needs == (Logp(0.7), Entropy())
    assert GRPO(entropy_coefficient=0.1).needs == (Logp(), Entropy(differentiable=True))
