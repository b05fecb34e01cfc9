from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxtrain.config import MeshSection
from jaxtrain.nn.config import ClampedSwiGLU
from jaxtrain.nn.moe import SparseMLP
from jaxtrain.objectives.sft import SFT
from jaxtrain.ops import exchange
from jaxtrain.ops.varying import varying_as
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import RULES, batch_sharding, param_specs
from jaxtrain.train.step import batch_norm, score

ONE_LAYER = {"num_layers": 1, "pattern": tiny.CONFIG.pattern[:1]}
MIXTURES = {
    "renormalised": tiny.MOE,
    "not renormalised": replace(tiny.MOE, renormalise=False, experts_per_token=3),
    "biases, clamped": replace(tiny.MOE, bias=True, swiglu=ClampedSwiGLU(alpha=1.7, limit=0.5)),
    "one expert": replace(tiny.MOE, num_experts=1, experts_per_token=1),
}


def layer(moe, seed=0):
    """The module's graph and random parameters."""
    with nnx.use_eager_sharding(False):
        module = SparseMLP(replace(tiny.CONFIG, moe=moe), rngs=nnx.Rngs(seed), dtype=jnp.dtype("float32"), lora=None)
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, noisy)


def every_expert_for_every_token(params, x, moe):
    """What `SparseMLP` means, with weights of 0 for those that were not chosen."""

    def linear(name, x, equation):
        of_all = params["experts"][name]
        y = jnp.einsum(equation, x, of_all["kernel"], precision="highest")
        return y + of_all["bias"] if moe.bias else y

    router = params["router"]
    logits = x @ router["kernel"] + router.get("bias", 0)
    chosen = logits >= jax.lax.top_k(logits, moe.experts_per_token)[0][..., -1:]
    weights = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf) if moe.renormalise else logits) * chosen
    gate, up = (linear(name, x, "btd,edf->btef") for name in ("gate_proj", "up_proj"))
    if moe.swiglu is None:
        hidden = jax.nn.silu(gate) * up
    else:
        gate, up = jnp.minimum(gate, moe.swiglu.limit), jnp.clip(up, -moe.swiglu.limit, moe.swiglu.limit)
        hidden = gate * jax.nn.sigmoid(moe.swiglu.alpha * gate) * (up + 1)
    return jnp.einsum("bted,bte->btd", linear("down_proj", hidden, "btef,efd->bted"), weights)


@pytest.mark.parametrize("moe", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(moe):
    graphdef, params = layer(moe)
    x = jax.random.normal(jax.random.key(5), (3, 40, tiny.CONFIG.hidden_size))
    segments = jnp.ones((3, 40), jnp.int32)

    def ours(params, x):
        y, routing = nnx.merge(graphdef, params)(x, segments, None)
        return jnp.sum(jnp.sin(y)), (y, routing)

    def theirs(params, x):
        y = every_expert_for_every_token(params, x, moe)
        return jnp.sum(jnp.sin(y)), y

    ours, theirs = (jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True)) for f in (ours, theirs))
    ((_, (y, routing)), grads), ((_, expected), expected_grads) = ours(params, x), theirs(params, x)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert_close(grads, expected_grads)
    assert float(routing.load.sum()) == 120 * moe.experts_per_token  # none is dropped


def test_no_token_is_dropped_if_all_choose_the_same_experts():
    moe = MIXTURES["biases, clamped"]
    graphdef, params = layer(moe)
    params["router"]["bias"] = jnp.asarray([0.0, 1e3, 0, 0, 0, 0, 2e3, 0])
    x = jax.random.normal(jax.random.key(5), (3, 40, tiny.CONFIG.hidden_size))
    y, routing = nnx.merge(graphdef, params)(x, jnp.ones((3, 40), jnp.int32), None)
    assert routing.load.tolist() == [0, 120, 0, 0, 0, 0, 120, 0]
    np.testing.assert_allclose(y, every_expert_for_every_token(params, x, moe), atol=1e-4)


def not_numbers(x, rows=None):
    return varying_as(jnp.full((rows or len(x), *x.shape[1:]), jnp.nan, x.dtype), x)


@pytest.mark.parametrize(
    "section",
    [
        MeshSection(preset="fsdp"),
        MeshSection(preset="fsdp_tensor", tensor=2, data=2),
        MeshSection(preset="fsdp_expert", expert=4),
    ],
    ids=lambda section: section.preset,
)
def test_sharded_equals_single(section, monkeypatch):
    """Also where the buffers of the exchange are not numbers before rows are received."""
    monkeypatch.setattr(exchange, "_unwritten", not_numbers)
    moe = MIXTURES["biases, clamped"]
    batch = tiny.packed_batch([[9, 20], [14], [31], [5, 5], [1, 30], [16, 16], [2, 2], [32]], 32)
    single = tiny.model(moe=moe, **ONE_LAYER)
    params = tiny.random_params(single)
    mesh = make_mesh(section)
    sharded = tiny.model(moe=moe, mesh=mesh, remat="full", **ONE_LAYER)
    specs = param_specs(sharded.axes(), sharded.abstract(), RULES[section.preset], mesh)
    if section.expert > 1:
        kernel = specs["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
        assert kernel.shard_shape((1, 8, 64, 48)) == (1, 2, 32, 48)

    def loss_of(model):
        def loss(params, batch):
            hidden, routing = model.forward(params, batch)
            return jnp.sum(hidden * jnp.cos(hidden)) + jnp.sum(routing.probability**2) + jnp.sum(routing.z), routing

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (value, routing), grads = loss_of(single)(params, batch)
    placed = jax.device_put(batch, batch_sharding(mesh))
    (sharded_value, sharded_routing), sharded_grads = loss_of(sharded)(jax.device_put(params, specs), placed)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    assert_close(sharded_routing, routing)
    assert_close(sharded_grads, grads)


@pytest.mark.parametrize("expert", [1, 4])
def test_no_buffer_has_every_expert_for_every_token(expert):
    """The temporaries of forward and backward together are a third of one [tokens, experts, F] at most."""
    moe = replace(tiny.MOE, num_experts=512, intermediate_size=64)
    rows, length = 32, 128
    mesh = make_mesh(MeshSection(preset="fsdp_expert", expert=expert, fsdp=1), jax.devices()[:expert])
    model = tiny.model(moe=moe, mesh=mesh, remat="full", **ONE_LAYER)
    shapes = model.abstract()
    shardings = param_specs(model.axes(), shapes, RULES["fsdp_expert"], mesh)
    params = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    batch = jax.device_put(tiny.packed_batch([[length]] * rows, length), batch_sharding(mesh))

    def loss(params, batch):
        return SFT()(score(model, params, batch), batch, batch_norm(batch))[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
    dispatch = rows * length // expert * moe.num_experts * moe.intermediate_size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < dispatch / 3


def test_padding_has_no_say_in_what_the_routers_report():
    model = tiny.model(moe=tiny.MOE, **ONE_LAYER)
    params = tiny.random_params(model)
    of = jax.jit(lambda batch: model.forward(params, batch)[1])
    assert_close(of(tiny.packed_batch([[9, 7], [16]], 16)), of(tiny.packed_batch([[9, 7], [16]], 40)))


def test_cached_decoding_equals_the_whole_row():
    model = tiny.model(moe=tiny.MOE, **ONE_LAYER)
    params = tiny.random_params(model)
    batch = tiny.packed_batch([[20], [20]], 20)
    tokens, positions, segments = batch.tokens, batch.positions, batch.segment_ids
    whole = model.hidden(params, batch)
    extend = jax.jit(model.extend)
    hidden, cache = extend(params, tokens[:, :17], positions[:, :17], segments[:, :17], model.empty_cache(2, 24))
    parts = [hidden]
    for t in range(17, 20):
        hidden, cache = extend(params, tokens[:, t : t + 1], positions[:, t : t + 1], segments[:, t : t + 1], cache)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def assert_close(one, other, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        scale = np.abs(b).max() + 1e-6
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))
