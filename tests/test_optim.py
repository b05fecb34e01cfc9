import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import OptimizerSection
from jaxtrain.optim import make_optimizer, make_schedule


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
