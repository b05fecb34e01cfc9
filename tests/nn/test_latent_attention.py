"""Latent attention with a mixture behind a dense layer: documents of a row, the cache of latent vectors, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from updates import assert_sharded_equals_single

from jaxtrain.config import MeshSection
from jaxtrain.nn.block import Execution
from jaxtrain.nn.config import Latent, MoE
from jaxtrain.parallel.mesh import make_mesh

LATENT = Latent(query_rank=24, rank=16, plain_width=12, rope_width=8, value_width=10, norm_eps=1e-6, neighbours=True)
MIXTURE = MoE(
    num_experts=8,
    experts_per_token=3,
    intermediate_size=48,
    renormalise=True,
    shared_size=32,
    scores="sigmoid",
    weight_scale=1.7,
    groups=4,
    groups_per_token=2,
)
PATTERN = (dataclasses.replace(tiny.KIND, dense=True), tiny.KIND)
SIZES = {"pattern": PATTERN, "num_layers": 2, "moe": MIXTURE}
SIZES |= {"latent": LATENT, "head_dim": 20, "num_kv_heads": 4, "qk_norm": None, "qkv_bias": False}


def test_a_document_does_not_depend_on_the_others_to_the_last_bit():
    model = tiny.model(**SIZES)
    params, batch = tiny.random_params(model), tiny.packed_batch([[9, 40, 3, 20]], 75)
    hidden = jax.jit(model.hidden)
    before = np.asarray(hidden(params, batch))
    for changed in (1, 3):
        inside = batch.segment_ids == changed
        tokens = np.where(inside, (batch.tokens + 1) % model.config.vocab_size, batch.tokens)
        after = np.asarray(hidden(params, batch._replace(tokens=tokens)))
        others = ~inside & (batch.segment_ids > 0)
        np.testing.assert_array_equal(after[others], before[others])
        assert not np.any((after[inside] == before[inside]).all(-1))


@pytest.mark.parametrize("lora", [None, dataclasses.replace(tiny.LORA, targets=("k_up", "v_up", "q_down", "o_proj"))])
def test_decoding_with_absorbed_matrices_equals_expanding_them(lora):
    """Prefilled as a packed row, then several tokens, then one by one; the cache holds nothing but latent vectors."""
    model = tiny.model(lora, **SIZES)
    params = tiny.random_params(model)
    batch = tiny.packed_batch([[30]], 30)
    expected = jax.jit(model.hidden)(params, batch)
    params = model.unstack(params)
    extend = jax.jit(model.extend)
    cache, parts = model.empty_cache(1, 32), []
    for start, stop in ((0, 20), (20, 27), (27, 28), (28, 29), (29, 30)):
        hidden, cache = extend(params, *(leaf[:, start:stop] for leaf in batch[:3]), cache)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=2e-5)
    of_token = sum(leaf.size for leaf in jax.tree.leaves(cache.layers[0])) / 32
    assert of_token == LATENT.rank + LATENT.rope_width

    prefilled = jax.jit(model.prefill)(params, *(leaf[:, :20] for leaf in batch[:3]))
    for one, other in zip(prefilled, cache.layers, strict=True):
        for ours, theirs in zip(one.all(), other.all(), strict=True):
            np.testing.assert_allclose(ours, theirs[:, :20], atol=2e-5)


@pytest.mark.parametrize("preset", ["fsdp_tensor", "fsdp_expert"])
def test_sharded_equals_single(preset):
    batch = tiny.packed_batch([[9, 20], [14, 14]] * 4, 32)
    mesh = make_mesh(MeshSection(preset=preset, fsdp=2, data=2, **{preset.removeprefix("fsdp_"): 2}))
    single = tiny.model(**SIZES)
    assert_sharded_equals_single(single, batch, mesh, preset)


def test_splash_attention_pads_the_values():
    plain, splash = tiny.model(**SIZES), tiny.model(**SIZES)
    splash = dataclasses.replace(splash, run=Execution(jnp.dtype("float32"), attention="splash"))
    params, batch = tiny.random_params(plain), tiny.packed_batch([[50, 70]], 128)
    one, other = (jax.jit(model.hidden)(params, batch) for model in (plain, splash))
    np.testing.assert_allclose(one[:, :120], other[:, :120], atol=2e-5)
