"""Layers with attention of two sizes, the last of which reuse keys and values; inputs of layers; experts beside a dense
layer: documents of a row, the cache, rematerialisation and meshes."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from updates import assert_sharded_equals_single

from jaxtrain.config import MeshSection
from jaxtrain.nn.cache import NoState
from jaxtrain.nn.config import GlobalAttention, LayerKind, ProportionalScaling, Rope
from jaxtrain.parallel.mesh import make_mesh

NEAR = LayerKind(window=7, rope=Rope(60.0))
FAR = LayerKind(window=None, rope=Rope(9e3, ProportionalScaling(1.0), 0.25), mixer="global")
COMMON = {"v_norm": True, "qkv_bias": False, "post_norms": True, "layer_scale": True}
REUSED = tuple(dataclasses.replace(kind, reuses=True, wide=True) for kind in (NEAR, FAR))
BESIDE = tuple(dataclasses.replace(kind, beside=True) for kind in (NEAR, FAR))
CASES = {
    "reuse": {
        **COMMON,
        "pattern": (NEAR, FAR, *REUSED * 2),  # the loop is over the layers that reuse
        "num_layers": 6,
        "global_attention": GlobalAttention(2, 32, False),
        "per_layer_width": 8,
    },
    "mixture": {
        **COMMON,
        "pattern": BESIDE * 2,
        "num_layers": 4,
        "global_attention": GlobalAttention(2, 32, True),
        "moe": dataclasses.replace(tiny.MOE, normed=True),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_document_does_not_depend_on_the_others_to_the_last_bit(case):
    model = tiny.model(**CASES[case])
    params, batch = tiny.random_params(model), tiny.packed_batch([[9, 40, 3]], 55)
    hidden = jax.jit(model.hidden)
    before = np.asarray(hidden(params, batch))
    for changed in (1, 3):
        inside = batch.segment_ids == changed
        tokens = np.where(inside, (batch.tokens + 1) % model.config.vocab_size, batch.tokens)
        after = np.asarray(hidden(params, batch._replace(tokens=tokens)))
        others = ~inside & (batch.segment_ids > 0)
        np.testing.assert_array_equal(after[others], before[others])
        assert not np.any((after[inside] == before[inside]).all(-1))


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_forward_pass(case):
    """Past the window, in pieces and one by one; layers that reuse keep nothing."""
    model = tiny.model(**CASES[case])
    params, batch = tiny.random_params(model), tiny.packed_batch([[30]], 30)
    expected = jax.jit(model.hidden)(params, batch)
    params, extend = model.unstack(params), jax.jit(model.extend)
    cache, parts = model.empty_cache(1, 32), []
    for start, stop in ((0, 20), (20, 23), (23, 24), (24, 25), (25, 30)):
        hidden, cache = extend(params, *(leaf[:, start:stop] for leaf in batch[:3]), cache)
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=5e-5)
    for kind, state in zip(model.config.pattern, cache.layers, strict=True):
        assert isinstance(state, NoState) == kind.reuses
        assert state.columns == (0 if kind.reuses else kind.window or 32)


@pytest.mark.parametrize(("case", "preset"), [("reuse", "fsdp_tensor"), ("mixture", "fsdp_expert")])
def test_sharded_and_rematerialised_equals_single(case, preset):
    batch = tiny.packed_batch([[9, 20], [14, 14]] * 4, 32)
    mesh = make_mesh(MeshSection(preset=preset, fsdp=2, data=2, **{preset.removeprefix("fsdp_"): 2}))
    single = tiny.model(**CASES[case])
    expected = assert_sharded_equals_single(single, batch, mesh, preset)
    assert not np.any(expected["layers"]["scale"])  # as in transformers, it is not trained
    others = {name: part for name, part in expected["layers"].items() if name != "scale"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_layers_that_reuse_need_one_that_does_not():
    with pytest.raises(ValueError, match="layer 1 reuses keys and values"):
        tiny.model(**{**CASES["reuse"], "pattern": (NEAR, REUSED[1]), "num_layers": 2})


def test_one_class_does_not_replace_attention_of_several_sizes():
    custom = dataclasses.replace(tiny.CONFIG.modules, attention="my_file:Attention")
    with pytest.raises(ValueError, match=r"model\.modules\.attention"):
        tiny.model(**CASES["mixture"], modules=custom)
