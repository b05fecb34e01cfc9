"""A rollout's samples as minibatches: signals go to the tokens of their samples, and updates go on after a resume."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.config import MeshSection, parse_config
from jaxtrain.objectives.policies import GRPO
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.advantages import group_centred
from jaxtrain.rl.algorithms import ALGORITHMS, Algorithm
from jaxtrain.rl.coefficients import Coefficients
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.experience import Experience, add_advantages, pack_samples, score_samples
from jaxtrain.rl.rollouts import NOT_PACKED, TokensAlone
from jaxtrain.train.step import batch_norm

SAMPLES = [
    trajectory(3 + prompt, 2 + sample, number=prompt, sample=sample, reward=float((1 + prompt) * sample))
    for prompt in range(3)
    for sample in range(4)
]


def packed(minibatches=3, iterations=1, samples=SAMPLES, algorithm="grpo", encode=None, **model):
    tree = {
        "recipe": "rl",
        "model": {"path": "base", **model},
        "data": {"train": {"path": "a.jsonl"}, "max_length": 32},
        "train": {"steps": 2},
        "rl": {
            "rewards": [{"function": "my_rewards.py:r"}],
            "algorithm": algorithm,
            "prompts": 30,
            "minibatches": minibatches,
            "iterations": iterations,
            "max_completion_length": 8,
        },
    }
    mesh = make_mesh(MeshSection())
    return pack_samples(Collected(list(samples), {}, 3), parse_config(tree, "test"), mesh, encode=encode)


def arrays(batches):
    return [{name: np.asarray(array) for name, array in batch.arrays().items()} for batch in batches]


def test_every_sample_is_in_one_minibatch_and_gets_back_what_was_spread():
    experience = packed(minibatches=5)
    assert [len(part.spans) for part in experience.minibatches] == [2, 2, 3, 2, 3]
    assert len({part.batch.tokens.shape for part in experience.minibatches}) == 1  # one program
    values = [np.random.default_rng(n).random(len(t.completion_ids)) for n, t in enumerate(SAMPLES)]
    experience.spread_signal("numbers", values)
    for found, expected in zip(experience.gather("numbers"), values, strict=True):
        np.testing.assert_array_equal(found, expected)
    inside = sum(float(part.batch.signals["numbers"].sum()) for part in experience.minibatches)
    assert inside == pytest.approx(sum(map(np.sum, values)))  # 0 on prompts and padding


def test_samples_left_out_are_in_no_row_and_counted_beside_the_others():
    samples = [t._replace(left_out=index in (1, 2, 6)) for index, t in enumerate(SAMPLES)]
    experience = packed(minibatches=2, samples=samples)
    first, second = (part.batch for part in experience.minibatches)
    lengths = [len(t.completion_ids) for t in samples]
    assert first.left_out.sum(0).tolist() == [lengths[1] + lengths[2], 2, 2]
    assert second.left_out.sum(0).tolist() == [lengths[6], 1, 1]
    assert (first.segment_ids > 0).sum() == sum(t.length for t in samples[:6] if not t.left_out)
    experience.spread_signal("numbers", [np.ones(n) for n in lengths])
    for found, t in zip(experience.gather("numbers"), samples, strict=True):
        np.testing.assert_array_equal(found, np.full(len(t.completion_ids), not t.left_out))
    norm = batch_norm(first)
    assert (norm.tokens, norm.segments, norm.bundles) == (sum(lengths[:6]), 6, 6)


def test_a_step_whose_samples_are_all_left_out_has_rows_of_padding():
    experience = packed(minibatches=1, samples=[t._replace(left_out=True) for t in SAMPLES])
    batch = experience.minibatches[0].batch
    assert len(batch.tokens) and not batch.segment_ids.any() and batch.left_out.sum(0)[1] == len(SAMPLES)


def test_a_value_after_the_end_is_the_critics_at_the_last_token_of_a_sample_that_was_cut_off():
    samples = [t._replace(finish_reason="length") if t.sample == 1 else t for t in SAMPLES]
    experience = packed(1, samples=samples)
    critic = SimpleNamespace(
        values=lambda batch: np.zeros(batch.tokens.shape, np.float32),
        rewards=lambda batch: batch.positions.astype(np.float32),
    )
    score_samples(experience, replace(ALGORITHMS["ppo"], bootstrap=True, objective=GRPO()), critic, None, critic)
    expected = [t.length - 1 if t.truncated else 0 for t in samples]
    assert experience.last_values is not None and experience.last_values.tolist() == expected


def test_the_penalty_has_the_coefficient_of_the_rollout_which_moves_for_the_next():
    objective = GRPO(beta=0.1, kl="k1", kl_in="reward", kl_target=0.5)
    experience = packed(1, algorithm="rloo")
    for name, value in (("old_logps", -1.0), ("ref_logps", -3.0)):
        experience.spread_signal(name, [np.full(len(t.completion_ids), value, np.float32) for t in SAMPLES])
    coefficients = Coefficients(0.2, 0.0)
    add_advantages(experience, replace(ALGORITHMS["dr_grpo"], objective=objective), {}, coefficients)
    rewards = np.array([t.reward - 0.2 * 2 * len(t.completion_ids) for t in SAMPLES]).reshape(3, 4)
    expected = (rewards - rewards.mean(1, keepdims=True)).ravel()
    found = [t.advantages[0] for t in experience.trajectories]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert experience.metrics["kl"] == pytest.approx(2) and experience.metrics["kl_coefficient"] == 0.2
    assert coefficients.beta == pytest.approx(0.2 * 1.02)
    lost = packed(1, samples=[t._replace(left_out=True) for t in SAMPLES], algorithm="rloo")
    for name in ("old_logps", "ref_logps"):
        lost.spread_signal(name, [np.zeros(len(t.completion_ids), np.float32) for t in SAMPLES])
    add_advantages(lost, replace(ALGORITHMS["dr_grpo"], objective=objective), {}, coefficients)
    assert coefficients.beta == pytest.approx(0.2 * 1.02)  # nothing was measured


def test_fewer_samples_than_minibatches_are_one_each():
    assert [len(part.spans) for part in packed(minibatches=5, samples=SAMPLES[:2]).minibatches] == [1, 1]


@pytest.mark.parametrize("done", [1, 4])
def test_after_a_resume_the_updates_that_are_left_are_the_same(done):
    whole = packed(minibatches=3, iterations=2)
    experience = packed(minibatches=3, iterations=2)
    taken = iter(experience)
    for _ in range(done):
        next(taken)
    assert experience.in_progress
    resumed = Experience.resumed(experience.pending_rows(), experience.updates, experience.done, Deal())
    expected = arrays(whole)[done:]
    for found, batch in zip(arrays(resumed), expected, strict=True):
        assert found.keys() == batch.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(found[name], array)
    assert not resumed.in_progress


def test_scores_are_made_only_where_something_reads_them():
    role = SimpleNamespace(logps=lambda batch, temperature: np.full(batch.tokens.shape, -1.0, np.float32))
    once, twice, reference = packed(1), packed(1, iterations=2), packed(1)
    for experience, of in ((once, None), (twice, None), (reference, role)):
        score_samples(experience, ALGORITHMS["grpo"], role, of, None)
    names = [set(each.minibatches[0].batch.signals) for each in (once, twice, reference)]
    assert "old_logps" not in names[0] and "ref_logps" not in names[0]
    assert "old_logps" in names[1] and "ref_logps" in names[2]


def test_advantages_are_those_of_the_estimator_at_the_samples_own_tokens():
    masked = [t._replace(loss_mask=np.arange(len(t.completion_ids)) > 0) for t in SAMPLES]
    experience = packed(2, samples=masked, algorithm="dr_grpo")
    add_advantages(experience, Algorithm(group_centred))
    rewards = np.array([t.reward for t in masked]).reshape(3, 4)
    centred = (rewards - rewards.mean(1, keepdims=True)).ravel()
    for found, t, advantage in zip(experience.gather("advantages"), experience.trajectories, centred, strict=True):
        np.testing.assert_allclose(found, advantage * t.loss_mask, atol=1e-6)
        np.testing.assert_array_equal(t.advantages, found)


def test_the_teachers_terms_are_added_to_the_advantages_of_the_rewards():
    samples = [t._replace(left_out=t.sample == 3) for t in SAMPLES]
    experience = packed(2, samples=samples, algorithm="rloo")
    rng = np.random.default_rng(0)
    p, q = ([rng.normal(size=len(t.completion_ids)).astype(np.float32) for t in samples] for _ in range(2))
    role = SimpleNamespace(logps=lambda batch, temperature: np.zeros(batch.tokens.shape, np.float32))
    algorithm = Algorithm(group_centred, teacher_coefficient=0.5)
    given = []

    def teacher(packed, trajectories, temperature, own):
        given.extend(own)
        return q

    teacher.metrics = {"teacher_aligned": 0.5}
    score_samples(experience, algorithm, role, None, None, teacher)
    assert [len(own) for own in given] == [len(t.completion_ids) for t in samples]
    assert experience.metrics["teacher_aligned"] == 0.5
    experience.spread_signal("old_logps", p)  # which one update alone would not have, but for the teacher
    add_advantages(experience, algorithm)
    rewards = np.array([t.reward for t in samples]).reshape(3, 4)
    centred = (rewards - rewards.mean(1, keepdims=True)).ravel()
    for t, own, theirs, advantage in zip(experience.trajectories, p, q, centred, strict=True):
        expected = 0 if t.left_out else advantage + 0.5 * (theirs - own)
        np.testing.assert_allclose(t.advantages * t.trained_mask, expected, rtol=1e-5, atol=1e-6)
    trained = [own - theirs for t, own, theirs in zip(samples, p, q, strict=True) if not t.left_out]
    assert experience.metrics["reverse_kl"] == pytest.approx(np.concatenate(trained).mean(), rel=1e-5)


def test_a_divergence_reads_no_signals_of_the_samples():
    experience = packed(2, encode=TokensAlone())
    assert [dict(part.batch.signals) for part in experience.minibatches] == [{}, {}]


def test_samples_whose_advantage_is_zero_are_left_out_with_the_advantages_of_all():
    samples = [t._replace(reward=0.1, rewards={"right": 0.1}) if t.prompt.number == 1 else t for t in SAMPLES]
    experience = packed(1, samples=samples)
    spans = experience.minibatches[0].spans
    assert [span.row == NOT_PACKED for span in spans] == [t.prompt.number == 1 for t in samples]
    assert experience.metrics["frac_advantage_zero"] == pytest.approx(1 / 3)
    batch = experience.minibatches[0].batch
    assert batch.left_out.sum(0).tolist() == [sum(len(t.completion_ids) for t in samples[4:8]), 4, 4]
    add_advantages(experience, ALGORITHMS["grpo"])
    rewards = np.array([t.reward for t in samples]).reshape(3, 4)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    found = [t.advantages[0] for t in experience.trajectories]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "model"), [("ppo", {}), ("rloo", {}), ("grpo", {"router_aux_loss_coef": 0.1})], ids=str
)
def test_nothing_is_left_out_where_more_than_the_advantage_trains(algorithm, model):
    samples = [t._replace(reward=0.1) for t in SAMPLES]
    experience = packed(1, samples=samples, algorithm=algorithm, **model)
    assert experience.estimates is None
    assert all(span.row != NOT_PACKED for span in experience.minibatches[0].spans)
