"""Remat: what a setting saves, and that no setting changes losses or gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn.remat import PRESETS
from jaxtrain.train.step import score

ONE_LAYER = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1]}

REMAT = ["dots", "full", (), (("qkv", "keep"), ("gate", "keep")), (("attention", "keep"), ("up", "offload"))]


BATCH = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)


def gradients(remat):
    """Losses and gradients of one layer: operation by operation, and compiled."""
    model = tiny.model(tiny.LORA, **ONE_LAYER)
    params = tiny.random_params(model)
    model = dataclasses.replace(model, run=dataclasses.replace(model.run, remat=remat))
    with jax.disable_jit():
        one_by_one = jax.value_and_grad(lambda params: jnp.sin(model.hidden(params, BATCH)).sum())(params)
    return one_by_one, jax.jit(jax.value_and_grad(lambda params: score(model, params, BATCH).logp.sum()))(params)


@pytest.fixture(scope="module")
def without():
    return gradients("none")


@pytest.mark.parametrize("remat", REMAT, ids=str)
def test_remat_changes_nothing(without, remat):
    """Bit for bit, operation by operation; compiled, XLA may fuse the operations of a loop in another way."""
    (expected, expected_compiled), (one_by_one, compiled) = without, gradients(remat)
    jax.tree.map(np.testing.assert_array_equal, expected, one_by_one)
    for one, two in zip(jax.tree.leaves(expected_compiled), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())


def saved(remat, **changes):
    """How many numbers the layers' loop saves for the backward pass, on the device and on the host."""
    model = tiny.model(remat=remat, **changes)
    params = tiny.random_params(model)
    gradient = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(score(model, params, BATCH).logp)))(params)
    forward = next(each for each in gradient.eqns if each.primitive.name == "scan")
    stacked = [out.aval for out in forward.outvars[forward.params["num_carry"] :]]
    on_host = [sum(each.size for each in stacked if ("host" in str(each)) == host) for host in (False, True)]
    return np.array(on_host)


@pytest.mark.parametrize(
    ("name", "floats"), [("qkv", 8 * 16), ("attention", 4 * 16 + 4), ("attention_out", 64), ("gate", 96), ("up", 96)]
)
def test_the_loop_of_layers_saves_what_is_named(name, floats):
    """`floats` of each of the 3 * 64 tokens of all layers: (N + 2 K) H, N (H + 1), D, F and F."""
    nothing = saved(())
    kept, offloaded = saved(((name, "keep"),)) - nothing, saved(((name, "offload"),)) - nothing
    assert kept.tolist() == [3 * 64 * floats, 0] and offloaded.tolist() == [0, 3 * 64 * floats]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_saves_what_its_names_save(preset):
    np.testing.assert_array_equal(saved(preset), saved(PRESETS[preset]))
    assert (saved(preset) > saved(())).any()
