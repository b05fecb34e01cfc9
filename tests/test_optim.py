import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import OptimizerSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_schedules_warm_up_to_the_peak_and_end_at_the_final_share(name, middle, end):
    section = OptimizerSection(learning_rate=2.0, schedule=name, warmup_steps=10, final_learning_rate=0.1)
    schedule = make_schedule(section, 110)
    assert 0 < schedule(0) == pytest.approx(0.2)
    assert schedule(10) == pytest.approx(2.0)
    assert schedule(60) == pytest.approx(2.0 * middle)
    assert schedule(110) == pytest.approx(2.0 * end)
    assert schedule(1000) == pytest.approx(2.0 * end)


def test_a_warmup_ratio_is_a_share_of_the_steps_also_for_a_schedule_of_ones_own():
    section = OptimizerSection(learning_rate=2.0, schedule="linear", warmup_ratio=0.1)
    schedule, same = (
        make_schedule(section, 101),
        make_schedule(OptimizerSection(learning_rate=2.0, schedule="linear", warmup_steps=11), 101),
    )
    assert [float(schedule(step)) for step in range(110)] == [float(same(step)) for step in range(110)]
    own = make_schedule(section.model_copy(update={"schedule": "custom_optimizers:warmup_steps"}), 101)
    assert own(0) == 11


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    model = tiny.model()
    params = tiny.random_params(model)
    section = OptimizerSection(name=name, learning_rate=0.1, weight_decay=0.5, schedule="constant")
    tx = make_optimizer(section, make_schedule(section, 10), model.axes())
    # With gradients of zero nothing but the decay moves a parameter.
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        moved = bool(np.any(update))
        assert moved == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_an_optimizer_and_a_schedule_are_named_by_import_path():
    args = {"offset": 4, "decay": 0.5}
    paths = {"name": "custom_optimizers:lion", "schedule": "custom_optimizers:inverse_square_root"}
    section = OptimizerSection(learning_rate=0.1, args=args, **paths)
    schedule = make_schedule(section, 10)
    assert schedule(0) == pytest.approx(0.05) and schedule(12) == pytest.approx(0.025)
    params = {"kernel": np.ones(3, np.float32)}
    tx = make_optimizer(section, schedule, {"kernel": ("embed",)})
    updates, _ = tx.update({"kernel": np.array([1.0, -2.0, 0.0], np.float32)}, tx.init(params), params)
    # Lion moves by the sign of the gradient, and decays by 0.5.
    np.testing.assert_allclose(updates["kernel"], -0.05 * np.array([1.5, -0.5, 0.5]), rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "custom_optimizers:lyon"}, "custom_optimizers has no lyon; did you mean lion"),
        ({"name": "custom_optimizers:no_optimizer"}, "must return an optax.GradientTransformation"),
        ({"schedule": "custom_optimizers:no_schedule"}, "optimizer.schedule=.*must return a function of the step"),
        ({"schedule": "custom_optimizers:vector_schedule"}, "floating-point scalar, not float32"),
        ({"schedule": "cosin"}, "should be one of constant, linear, cosine, or package.module:function"),
        ({"args": {"decay": 1}}, "args are for an optimizer or schedule named by import path"),
    ],
)
def test_a_path_that_names_no_optimizer_or_schedule_is_an_error(keys, message):
    with pytest.raises(ValueError, match=message):
        section = OptimizerSection(**keys)
        make_optimizer(section, make_schedule(section, 10), {})


def test_a_run_trains_with_an_optimizer_named_by_import_path():
    model, batch = tiny.model(), tiny.packed_batch([[9, 20], [14, 14]], 32)
    section = OptimizerSection(name="custom_optimizers:lion", learning_rate=1e-3)
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, model.axes())
    params = tiny.random_params(model)
    state, report = jax.jit(make_step(model, tx, schedule, SFT()))(new_state(params, tx, jax.random.key(0)), {}, batch)
    assert report.skipped == 0
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))
