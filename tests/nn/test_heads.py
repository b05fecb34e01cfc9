"""Heads by name: their parameters, what they compute, and that they train on a mesh as on one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.config import MeshSection
from jaxtrain.lora import join, split_adapters
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, param_specs
from jaxtrain.train.step import score

LOW_RANK = "custom_heads:low_rank"


def with_head(output, lora=None, **changes):
    return replace(tiny.model(lora, **changes), output=output)


@pytest.mark.parametrize("tied", [True, False])
def test_a_scalar_head_gives_a_number_a_token_and_replaces_the_vocabulary(tied):
    model = with_head("scalar", tied=tied)
    params = tiny.random_params(model)
    assert params["value_head"]["kernel"].shape == (64, 1)
    assert "lm_head" not in params
    batch = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
    hidden = model.hidden(params, batch)
    values = model.values(params, hidden)
    assert values.shape == batch.tokens.shape and values.dtype == jnp.float32
    np.testing.assert_allclose(values, (hidden @ params["value_head"]["kernel"])[..., 0], atol=1e-5)


def test_new_heads_are_trained_beside_adapters():
    for output, name in (("scalar", "value_head"), (LOW_RANK, "custom_head")):
        params = with_head(output, tiny.LORA).abstract()
        trained, base = split_adapters(params)
        assert name in trained and name not in base and join(trained, base) == params


def test_a_head_of_ones_own_is_scored_decoded_and_trained_on_a_mesh():
    model = with_head(LOW_RANK)
    params = tiny.random_params(model)
    assert set(params["custom_head"]) == {"down", "kernel"}
    batch = tiny.packed_batch([[9, 20], [14, 14]] * 2, 32)

    def loss(model):
        return jax.jit(
            jax.value_and_grad(lambda params: -jnp.sum(score(model, params, batch).logp * batch.loss_weights))
        )

    value, grads = loss(model)(params)
    logits = model.logits(params, model.hidden(params, batch))
    expected = jax.nn.log_softmax(logits)[:, :-1]
    expected = np.take_along_axis(expected, batch.tokens[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(value, -np.sum(expected * batch.loss_weights[:, 1:]), rtol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["custom_head"]))

    mesh = make_mesh(MeshSection(preset="fsdp_tensor", tensor=2, fsdp=2), jax.devices()[:4])
    sharded = with_head(LOW_RANK, mesh=mesh)
    placed = jax.device_put(params, param_specs(model.axes(), params, RULES["fsdp_tensor"], mesh))
    split_value, split_grads = loss(sharded)(placed)
    np.testing.assert_allclose(split_value, value, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(split_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("custom_heads.low_rank", "must be of the form package.module:name"),
        ("no_such_module:head", "model.head: module no_such_module was not found"),
        ("custom_heads:lowrank", "custom_heads has no lowrank; did you mean low_rank"),
        ("custom_heads:no_head", "must return a jaxtrain.nn.heads.CustomHead, not Linear"),
    ],
)
def test_a_path_that_is_no_head_is_an_error(path, message):
    with pytest.raises(ValueError, match=message):
        with_head(path).abstract()
