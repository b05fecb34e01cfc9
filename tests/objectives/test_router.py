import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from jaxtrain.nn.config import RouterLoss
from jaxtrain.nn.router import by_softmax, routing_of
from jaxtrain.objectives.router import router_loss
from jaxtrain.types import Routing

LAYERS, ROWS, LENGTH = 3, 4, 25
EXPERTS, CHOICES = tiny.MOE.num_experts, tiny.MOE.experts_per_token


def layers_of(logits, real):
    each = [routing_of(layer, by_softmax(layer, tiny.MOE), real) for layer in logits]
    return Routing(*(jnp.stack(leaves) for leaves in zip(*each, strict=True)))


@pytest.fixture(scope="module")
def problem():
    logits = jax.random.normal(jax.random.key(0), (LAYERS, ROWS, LENGTH, EXPERTS))
    real = jnp.arange(LENGTH) < jnp.asarray([25, 10, 3, 17])[:, None]
    return logits, real


def test_the_balancing_loss_and_its_gradient_are_those_of_transformers(problem):
    logits, real = problem
    theirs = [torch.tensor(np.asarray(layer).reshape(-1, EXPERTS), requires_grad=True) for layer in logits]
    mask = torch.tensor(np.asarray(real), dtype=torch.int64)
    loss = load_balancing_loss_func(tuple(theirs), EXPERTS, CHOICES, mask)
    loss.backward()

    def ours(logits):
        value, metrics = router_loss(layers_of(logits, real), tiny.MOE, RouterLoss(balance=1.0))
        return value, metrics

    (value, metrics), grad = jax.value_and_grad(ours, has_aux=True)(logits)
    assert float(value) == pytest.approx(loss.item(), rel=1e-6) == float(metrics["aux_loss"].value)
    for ours_, theirs_ in zip(grad, theirs, strict=True):
        np.testing.assert_allclose(ours_.reshape(-1, EXPERTS), theirs_.grad, atol=1e-7)
    assert not np.any(np.asarray(grad)[:, ~np.asarray(real)])  # padding has no say


def test_the_z_loss_and_the_load_by_hand(problem):
    logits, real = problem
    value, metrics = router_loss(layers_of(logits, real), tiny.MOE, RouterLoss(z=0.5))
    tokens = np.asarray(logits)[:, np.asarray(real)]  # [L, tokens, E]
    z = np.mean(np.log(np.exp(tokens).sum(-1)) ** 2)
    assert float(value) == pytest.approx(0.5 * z, rel=1e-5)
    assert float(metrics["router_z_loss"].value) == pytest.approx(z, rel=1e-5)
    chosen = np.argsort(-tokens, -1)[..., :CHOICES]
    most = [np.bincount(layer.ravel(), minlength=EXPERTS).max() for layer in chosen]
    expected = np.mean(most) / (tokens.shape[1] * CHOICES / EXPERTS)
    assert float(metrics["expert_load_max"].value) == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_nothing_but_padding_has_no_loss(problem):
    logits, real = problem
    value, metrics = router_loss(layers_of(logits, real & False), tiny.MOE, RouterLoss(1.0, 1.0))
    assert float(value) == 0
    assert all(float(mean.weight) == 0 for mean in metrics.values())
