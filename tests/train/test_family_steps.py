"""A packed SFT step of the families whose forward pass has most to it."""

from dataclasses import replace

import hf_folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.config import OptimizerSection
from jaxtrain.nn.config import RouterLoss
from jaxtrain.nn.model import Model
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

SFT_METRICS = {"loss", "mean_token_accuracy", "entropy"}
ROUTERS = {"aux_loss", "router_z_loss", "expert_load_max"}


@pytest.mark.parametrize("case", ["qwen3-moe", "gpt-oss", "gemma3", "glm4-moe", "deepseek-v3", "gemma4"])
def test_a_packed_step_is_finite_and_has_the_right_metrics(case, tmp_path):
    hf_folders.hf_model(case).save_pretrained(tmp_path)
    params, config, _ = hf_folders.load(tmp_path)
    batch = tiny.packed_batch([[40, 50, 3], [96]], 96)
    state, report = one_step(Model(config), params, batch)
    assert report.means.keys() == (SFT_METRICS | ROUTERS if config.moe else SFT_METRICS)
    assert all(np.isfinite(mean.value) for mean in report.means.values())
    assert report.skipped == 0 and 0 < report.grad_norm < np.inf
    moved = jax.tree.map(lambda new, old: bool(jnp.any(new != old)), state.params, params)
    if config.moe and config.moe.scores == "sigmoid":
        assert moved["layers"]["mlp"].pop("balance") is False  # no gradient, no decay
    if config.layer_scale:
        assert moved["layers"].pop("scale") is False
    assert all(jax.tree.leaves(moved)), moved

    if config.moe:
        assert report.means["aux_loss"].value >= config.moe.experts_per_token * 0.99
        assert report.means["expert_load_max"].value >= 1
        balanced, _ = one_step(replace(Model(config), router_loss=RouterLoss(balance=1.0)), params, batch)
        routers = [of.params["layers"]["mlp"]["router"]["kernel"] for of in (state, balanced)]
        assert not np.allclose(*routers, atol=1e-5)


def one_step(model, params, batch):
    section = OptimizerSection(learning_rate=1e-3, schedule="constant")
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, model.axes())
    step = jax.jit(make_step(model, tx, schedule, SFT()))
    state, report = step(new_state(params, tx, jax.random.key(0)), {}, batch)
    return state, jax.device_get(report)
