"""Steps of a policy and a critic on packed trajectories: microbatches, and scores among the support."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
import tiny
from trajectories import trajectory

from jaxtrain.config import MeshSection, OptimizerSection
from jaxtrain.objectives.importance import Correction
from jaxtrain.objectives.policies import GRPO, ClippedPolicy
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.rollouts import pack
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step, score


@pytest.fixture(scope="module")
def batch():
    """Twelve samples of uneven lengths in four rows, with top-k supports."""
    rng = np.random.default_rng(0)
    trajectories = []
    for index in range(12):
        length = int(rng.integers(2, 12))
        t = trajectory(4, length, sample=index)
        supports = np.stack([rng.permutation(101)[:6] for _ in range(length)]).astype(np.int32)
        supports[:, 0] = t.completion_ids
        trajectories.append(t._replace(supports=supports))
    packed = pack(trajectories, 40, rows=4)
    names = ("old_logps", "advantages", "values", "returns")
    noise = {name: [rng.normal(size=t.loss_mask.size).astype(np.float32) for t in trajectories] for name in names}
    return packed.spread(**noise).batch


def one_step(model, params, batch, objective, microbatches=1):
    section = OptimizerSection(learning_rate=1e-2, schedule="constant", eps=1e-3)
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, model.axes())
    step = make_step(model, tx, schedule, objective, microbatches=microbatches, max_grad_norm=1.0)
    state, report = jax.jit(step)(new_state(params, tx, jax.random.key(0)), {}, batch)
    return state.params, {name: float(metric.value) for name, metric in report.means.items()}


@pytest.mark.parametrize("role", ["policy", "policy with an entropy bonus", "critic"])
def test_microbatches_are_one_batch(batch, role):
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
    more = {"entropy_coefficient": 0.1, "top_entropy": 0.5} if "entropy" in role else {"off_policy_threshold": 0.1}
    objective = GRPO(level="sequence", correction=Correction("sequence"), temperature=0.7, **more)
    if role == "critic":
        model, objective = type(model)(model.config, None, model.run, output="scalar"), ClippedValue(0.2)
    params = model.init(jax.random.key(0))
    (whole, one), (cut, many) = (one_step(model, params, batch, objective, pieces) for pieces in (1, 2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert one.keys() == many.keys()
    for name in one:
        assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("correction", [Correction("token"), Correction("sequence")], ids=lambda each: each.level)
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_the_step_does_not_depend_on_the_separable_shortcut(batch, sharded, correction, microbatches):
    """Also if an objective declares itself separable although it is not, as with a sequence-level correction."""
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2), jax.devices()[:4]) if sharded else None
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1], mesh=mesh)

    @dataclass(frozen=True, kw_only=True)
    class Declared(ClippedPolicy):
        declared: bool

        @property
        def separable(self):
            return self.declared

    general, shortcut = (Declared(correction=correction, temperature=0.7, declared=d) for d in (False, True))
    batch = batch._replace(signals={k: v for k, v in batch.signals.items() if k != "old_logps"})  # on policy
    params = model.init(jax.random.key(0))
    (plain, one), (other, two) = (one_step(model, params, batch, o, microbatches) for o in (general, shortcut))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert two == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_a_filtered_sample_is_scored_among_the_kept_tokens(batch):
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
    params = model.init(jax.random.key(0))
    logp = np.asarray(score(model, params, batch, temperature=0.7).logp)
    logits = np.asarray(model.logits(params, model.hidden(params, batch))) / 0.7
    for row, column in np.argwhere(batch.loss_weights > 0)[::5]:
        support = batch.signals["supports"][row, column]
        kept = logits[row, column - 1, np.unique(support)].astype(np.float64)
        expected = logits[row, column - 1, batch.tokens[row, column]] - np.log(np.exp(kept).sum())
        assert logp[row, column] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo"])
def test_a_step_is_the_same_without_the_samples_whose_advantage_is_zero(aggregation):
    samples = [trajectory(4, 3 + number, number=number) for number in range(6)]
    advantages = [
        np.full(len(t.completion_ids), index % 2 * (index - 2.5), np.float32) for index, t in enumerate(samples)
    ]
    model = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
    params = model.init(jax.random.key(0))

    def stepped(left_out):
        kept = [t._replace(left_out=left_out and not a.any()) for t, a in zip(samples, advantages, strict=True)]
        packed = pack(kept, 24).spread(advantages=advantages)
        return (len(packed.batch.tokens), *one_step(model, params, packed.batch, GRPO(aggregation=aggregation)))

    (rows, whole, one), (fewer, part, other) = stepped(False), stepped(True)
    assert fewer < rows
    for a, b, start in zip(*map(jax.tree.leaves, (whole, part, params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert (np.asarray(a) != np.asarray(start)).any()
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
