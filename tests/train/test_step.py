from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxtrain.config import MeshSection, OptimizerSection
from jaxtrain.lora import join, merge_adapters, split_adapters
from jaxtrain.objectives.objective import Logp
from jaxtrain.objectives.policies import GRPO
from jaxtrain.objectives.sft import SFT
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.rounding import _count
from jaxtrain.train.state import new_state, state_shardings
from jaxtrain.train.step import batch_norm, make_step, score
from jaxtrain.types import Mean

LENGTHS = [[9, 20, 3], [14, 14], [31], [5, 5, 5], [1, 30], [16, 16], [2, 2, 2, 2], [32]]


def after_steps(model, params, batch, *, steps=3, microbatches=1, optimizer="adamw", frozen=None, objective=None):
    """`frozen`: the base's parameters, where `params` are adapters."""
    # Adam divides a gradient by its own size: with a small eps, rounding noise around 0 would become a whole step.
    section = OptimizerSection(name=optimizer, learning_rate=1e-2, weight_decay=0.1, schedule="constant", eps=1e-3)
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, split_adapters(model.axes())[0] if frozen else model.axes())
    step = make_step(model, tx, schedule, objective or SFT(), microbatches=microbatches, max_grad_norm=1.0)
    state = new_state(params, tx, jax.random.key(0))
    step, reports = jax.jit(step), []
    for _ in range(steps):
        state, report = step(state, frozen or {}, batch)
        reports.append(jax.device_get(report))
    return state, reports


def assert_close(one, other, tolerance=2e-5):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_microbatches_equal_one_batch():
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    params = tiny.random_params(model)
    whole, one = after_steps(model, params, batch)
    cut, many = after_steps(model, params, batch, microbatches=4)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(a.means["loss"].value, b.means["loss"].value, rtol=1e-5)
        assert a.num_tokens == b.num_tokens
    assert_close(whole.params, cut.params)


@pytest.mark.parametrize("moe", [None, tiny.MOE], ids=["dense", "experts"])
def test_microbatches_of_padding_alone_change_nothing(moe):
    """As a host whose data are exhausted adds them; microbatches are strided, so every second row makes one."""
    model = tiny.model(moe=moe)
    some = tiny.packed_batch(LENGTHS[:4], 32)
    padded = jax.tree.map(lambda leaf: np.stack([leaf, np.zeros_like(leaf)], 1).reshape(8, *leaf.shape[1:]), some)
    params = tiny.random_params(model)
    alone, expected = after_steps(model, params, some)
    state, reports = after_steps(model, params, padded, microbatches=2)
    for a, b in zip(reports, expected, strict=True):
        assert a.skipped == 0
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        for name, metric in b.means.items():
            np.testing.assert_allclose(a.means[name].value, metric.value, rtol=1e-5, err_msg=name)
    assert_close(state.params, alone.params)


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [
        pytest.param(MeshSection(preset="fsdp"), True, id="fsdp8-tied"),
        pytest.param(MeshSection(preset="fsdp", data=2), False, id="data2-fsdp4-untied"),
        pytest.param(MeshSection(preset="fsdp_tensor", tensor=2), False, id="fsdp4-tensor2-untied"),
        pytest.param(MeshSection(preset="fsdp_tensor", data=2, tensor=2), True, id="data2-fsdp2-tensor2-tied"),
    ],
)
def test_sharded_equals_single(mesh, tied):
    batch = tiny.packed_batch(LENGTHS, 32)
    single = tiny.model(tied=tied)
    params = tiny.random_params(single)
    expected, reports = after_steps(single, params, batch)

    devices = make_mesh(mesh)
    sharded = tiny.model(mesh=devices, tied=tied)
    specs = param_specs(sharded.axes(), sharded.abstract(), RULES[mesh.preset], devices)
    placed = jax.device_put(batch, batch_sharding(devices))
    state, sharded_reports = after_steps(sharded, jax.device_put(params, specs), placed)
    for a, b in zip(reports, sharded_reports, strict=True):
        np.testing.assert_allclose(a.means["loss"].value, b.means["loss"].value, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
    assert_close(expected.params, state.params)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_every_optimizer_lowers_the_loss(optimizer):
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    _, reports = after_steps(model, tiny.random_params(model), batch, steps=8, optimizer=optimizer)
    losses = [float(report.means["loss"].value) for report in reports]
    assert losses[-1] < losses[0] - 0.3, losses


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    section = OptimizerSection(schedule="constant")
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, model.axes())
    step = jax.jit(make_step(model, tx, schedule, SFT(), max_grad_norm=1.0))
    state = new_state(tiny.random_params(model), tx, jax.random.key(0))
    poisoned = batch._replace(loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))

    after, _ = step(state, {}, poisoned)
    twice, report = step(after, {}, poisoned)
    assert (int(report.skipped), int(report.skipped_in_a_row)) == (2, 2)
    for old, new in zip(
        jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((twice.params, twice.opt_state)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    good, report = step(twice, {}, batch)
    assert (int(report.skipped), int(report.skipped_in_a_row)) == (2, 0)
    assert int(good.step) == 3
    assert np.any(good.params["norm"]["scale"] != state.params["norm"]["scale"])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_updates_lost_to_rounding_are_those_that_change_nothing(microbatches):
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.random_params(model))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)  # in its state, so that one program takes all rates
    step = jax.jit(make_step(model, tx, lambda step: jnp.zeros(()), SFT(), microbatches=microbatches))
    gradient = jax.jit(jax.grad(lambda params: mean_loss(model, params, batch)))(params)
    initial = new_state(params, tx, jax.random.key(0))
    for rate in (1e-6, 1e-4, 1e-1):
        hyperparams = {**initial.opt_state.hyperparams, "learning_rate": jnp.asarray(rate)}
        opt_state = initial.opt_state._replace(hyperparams=hyperparams)
        state, report = step(initial._replace(opt_state=opt_state), {}, batch)
        share = report.means["updates_lost_to_rounding"]
        exact, _ = tx.update(gradient, opt_state)
        moved = sum(int((a != b).sum()) for a, b in zip(*map(jax.tree.leaves, (params, state.params)), strict=True))
        updated = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(exact))
        np.testing.assert_allclose(float(share.weight), updated, rtol=2e-3)
        # XLA may keep an update in more than bfloat16 within a fusion, so single parameters round differently.
        np.testing.assert_allclose(float(share.weight - share.total), moved, atol=0.002 * updated)
        assert (rate < 1e-2) == (float(share.value) > 0.9)


def mean_loss(model, params, batch):
    return SFT()(score(model, params, batch), batch, batch_norm(batch))[0]


def test_float32_parameters_have_no_such_metric_and_a_skipped_step_loses_nothing():
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    params = tiny.random_params(model)
    _, reports = after_steps(model, params, batch, steps=1)
    assert "updates_lost_to_rounding" not in reports[0].means
    poisoned = batch._replace(loss_weights=np.where(batch.loss_weights > 0, np.inf, 0).astype(np.float32))
    _, reports = after_steps(model, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), poisoned, steps=1)
    lost = reports[0].means["updates_lost_to_rounding"]
    assert (float(lost.total), float(lost.weight)) == (0, 0)


def test_updates_are_counted_beyond_2_to_the_24():
    assert float(_count(jnp.ones((4097, 4096), bool))) == 4097 * 4096


def test_lora_trains_the_adapters_alone_and_merges_into_the_same_model():
    model, batch = tiny.model(lora=tiny.LORA), tiny.packed_batch(LENGTHS, 32)
    adapters, base = split_adapters(tiny.random_params(model))
    state, reports = after_steps(model, adapters, batch, frozen=base)
    assert float(reports[-1].means["loss"].value) < float(reports[0].means["loss"].value)
    full = join(state.params, base)
    merged = merge_adapters(full, tiny.LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.model().abstract())
    unmerged_logp = np.asarray(score(model, full, batch).logp)
    np.testing.assert_allclose(score(tiny.model(), merged, batch).logp, unmerged_logp, atol=2e-5)


def test_fresh_adapters_are_the_base_model():
    model, batch = tiny.model(lora=tiny.LORA), tiny.packed_batch(LENGTHS, 32)
    params = model.init(jax.random.key(0))
    with_adapters = score(model, params, batch).logp
    np.testing.assert_array_equal(with_adapters, score(tiny.model(), split_adapters(params)[1], batch).logp)


def test_adapter_dropout_is_drawn_anew_each_step_and_repeats_with_the_key():
    lora = tiny.Lora(4, 8.0, 0.5, ("q_proj", "down_proj"))
    model, batch = tiny.model(lora=lora), tiny.packed_batch(LENGTHS, 32)
    params = tiny.random_params(model)
    one, again, other = (score(model, params, batch, jax.random.key(seed)).logp for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-3


def test_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2))
    model = tiny.model(mesh=mesh)
    specs = param_specs(model.axes(), model.abstract(), RULES["fsdp_tensor"], mesh)
    params = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), model.abstract(), specs)
    section = OptimizerSection()
    tx = make_optimizer(section, make_schedule(section, 10), model.axes())
    state = jax.eval_shape(lambda p: new_state(p, tx, jax.random.key(0)), params)
    shardings = state_shardings(state._replace(params=params), mesh)
    adam = shardings.opt_state[0]
    assert adam.mu == specs
    assert adam.nu == specs
    assert adam.count.is_fully_replicated
    assert jnp.ndim(state.step) == 0


@dataclass(frozen=True)
class Centred:
    """-logp of every token, weighed by how far it lies from the mean of the whole batch: `prepare` finds that mean."""

    @property
    def needs(self):
        return (Logp(),)

    @property
    def signals(self):
        return ("baseline",)

    @property
    def separable(self):
        return True

    def prepare(self, score, batch):
        logp = score(Logp()).logp
        mean = jnp.sum(logp * batch.loss_weights) / jnp.sum(batch.loss_weights)
        return {"baseline": jnp.full_like(logp, mean)}

    def __call__(self, scores, batch, norm):
        weights = batch.loss_weights
        assert scores.entropy is None and scores.correct is None, "they were not asked for"
        distance = scores.logp - batch.signals["baseline"]
        value = jnp.sum(distance**2 * weights) / norm.tokens
        return value, {"loss": Mean(value, jnp.sum(weights) / norm.tokens)}


@pytest.mark.parametrize("mesh", [None, MeshSection(preset="fsdp")], ids=["single", "fsdp"])
def test_signals_of_an_objective_are_those_of_the_whole_batch(mesh):
    """The gradient is that of the variance with its mean held, in whatever pieces the batch is computed."""
    mesh = mesh and make_mesh(mesh, jax.devices()[:2])
    model, batch = tiny.model(mesh=mesh), tiny.packed_batch(LENGTHS, 32)
    params = tiny.random_params(model)
    states, losses = [], []
    for pieces in (1, 2):
        state, reports = after_steps(model, params, batch, steps=2, microbatches=pieces, objective=Centred())
        states.append(state.params)
        losses.append([float(report.means["loss"].value) for report in reports])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert_close(*states)
    logp = jax.jit(lambda params, batch: score(model, params, batch).logp)(params, batch)
    own = np.asarray(logp)[batch.loss_weights > 0]
    assert losses[0][0] == pytest.approx(own.var(), rel=1e-4)


def test_a_signal_that_is_missing_is_named():
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    with pytest.raises(ValueError, match="GRPO needs the signal 'advantages', and the batch has none"):
        after_steps(model, tiny.random_params(model), batch, objective=GRPO())


@pytest.mark.parametrize(("head", "objective"), [("lm", ClippedValue(0.2)), ("scalar", SFT())])
def test_a_score_that_the_head_does_not_give_is_named(head, objective):
    model = replace(tiny.model(), output=head)
    with pytest.raises(
        ValueError, match=f"{type(objective).__name__} needs .*, which model.head={head} does not compute"
    ):
        make_step(model, optax.identity(), lambda step: 1.0, objective)


@dataclass(frozen=True)
class WithNumber(SFT):
    """Returns a metric that is a number."""

    def __call__(self, scores, batch, norm):
        loss, metrics = super().__call__(scores, batch, norm)
        return loss, metrics | {"share": jnp.float32(0.5)}


def test_a_metric_that_microbatches_cannot_combine_is_named():
    model, batch = tiny.model(), tiny.packed_batch(LENGTHS, 32)
    with pytest.raises(ValueError, match=r"WithNumber: the metric share must be a Mean, Max or Min \(got .*\)"):
        after_steps(model, tiny.random_params(model), batch, objective=WithNumber())
