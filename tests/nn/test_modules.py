"""Modules of the decoder named by import path: each one trains a step, on a mesh too, and decodes as it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection, OptimizerSection
from jaxtrain.nn.config import Modules
from jaxtrain.nn.modules import check_exportable
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, param_specs
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step, score

CLASSES = {
    "attention": ("custom_modules:TemperedAttention", "attn", None),
    "mlp": ("custom_modules:PlainMLP", "mlp", "up_proj"),
    "norm": ("custom_modules:LayerNorm", "input_norm", "shift"),
}


def model_with(role, mesh=None):
    return tiny.model(mesh=mesh, modules=Modules(**{role: CLASSES[role][0]}))


@pytest.mark.parametrize("role", CLASSES)
def test_a_replaced_module_trains_a_step(role):
    model, batch = model_with(role), tiny.packed_batch([[9, 20], [14, 14]], 32)
    params = tiny.random_params(model)
    _, module, parameter = CLASSES[role]
    assert parameter is None or parameter in params["layers"][module]
    section = OptimizerSection(learning_rate=1e-2, schedule="constant")
    schedule = make_schedule(section, 10)
    tx = make_optimizer(section, schedule, model.axes())
    step = jax.jit(make_step(model, tx, schedule, SFT()))
    state, report = step(new_state(params, tx, jax.random.key(0)), {}, batch)
    assert np.isfinite(report.grad_norm) and report.skipped == 0
    moved = jax.tree.map(
        lambda new, old: bool(np.any(new != old)), state.params["layers"][module], params["layers"][module]
    )
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize("role", CLASSES)
def test_a_replaced_module_is_sharded_and_gives_other_scores_than_the_default(role):
    batch = tiny.packed_batch([[9, 20], [14, 14]] * 2, 32)
    model = model_with(role)
    params = tiny.random_params(model)
    single = score(model, params, batch).logp
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2, fsdp=2), jax.devices()[:4])
    placed = jax.device_put(params, param_specs(model.axes(), params, RULES["fsdp_tensor"], mesh))
    sharded = jax.jit(lambda params: score(model_with(role, mesh), params, batch).logp)(placed)
    np.testing.assert_allclose(sharded, single, atol=2e-4)
    default = score(tiny.model(), tiny.random_params(tiny.model()), batch).logp
    assert not np.allclose(default, single, atol=1e-3)


@pytest.mark.parametrize("role", CLASSES)
def test_a_replaced_module_decodes_as_it_trains(role):
    model, batch = model_with(role), tiny.packed_batch([[20]], 20)
    params = tiny.random_params(model)
    hidden, extend = jax.jit(model.hidden)(params, batch), jax.jit(model.extend)
    cached = model.empty_cache(1, 20)
    ones = jnp.ones((1, 10), jnp.int32)
    halves = []
    for start in (0, 10):
        span = slice(start, start + 10)
        half, cached = extend(params, batch.tokens[:, span], batch.positions[:, span], ones, cached)
        halves.append(half)
    np.testing.assert_allclose(jnp.concatenate(halves, 1), hidden, atol=1e-4)


def test_a_mixture_takes_a_dense_mlp_by_path():
    model = tiny.model(moe=tiny.MOE, modules=Modules(mlp="custom_modules:PlainMLP"))
    assert set(model.abstract()["layers"]["mlp"]) == {"up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("custom_modules:PlainMPL", "model.modules.mlp: custom_modules has no PlainMPL; did you mean PlainMLP"),
        ("custom_modules:not_a_class", "model.modules.mlp=.* must name a subclass of flax.nnx.Module"),
        ("PlainMLP", "must be of the form package.module:name"),
    ],
)
def test_a_path_that_names_no_module_is_an_error(path, message):
    with pytest.raises(ValueError, match=message):
        tiny.model(modules=Modules(mlp=path)).abstract()


def test_only_modules_that_match_the_default_are_exported():
    check_exportable(tiny.model(modules=Modules(norm="custom_modules:SameNorm")).config)
    with pytest.raises(ValueError, match=r"model.modules.norm=custom_modules:LayerNorm.*matches_default"):
        check_exportable(model_with("norm").config)
