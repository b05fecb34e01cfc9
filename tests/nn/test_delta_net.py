"""Recurrent layers between layers of attention: documents of a row, padding, caches and meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from updates import assert_sharded_equals_single

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh

PATTERN = (tiny.DELTA_KIND, tiny.KIND)
SHARED = dataclasses.replace(tiny.MOE, shared_size=24, shared_gate=True)
SIZES = {"pattern": PATTERN, "num_layers": 2, "delta": tiny.DELTA, "attention_gate": True}


@pytest.mark.parametrize("moe", [None, SHARED], ids=["dense", "mixture"])
def test_a_document_does_not_depend_on_the_others_to_the_last_bit(moe):
    model = tiny.model(**SIZES, moe=moe)
    params, batch = tiny.random_params(model), tiny.packed_batch([[9, 40, 3, 20]], 75)
    hidden = jax.jit(model.hidden)
    before = np.asarray(hidden(params, batch))
    for changed in range(1, 5):
        inside = batch.segment_ids == changed
        tokens = np.where(inside, (batch.tokens + 1) % model.config.vocab_size, batch.tokens)
        after = np.asarray(hidden(params, batch._replace(tokens=tokens)))
        others = ~inside & (batch.segment_ids > 0)
        np.testing.assert_array_equal(after[others], before[others])
        assert not np.any((after[inside] == before[inside]).all(-1))


def test_padding_and_rows_that_do_not_run_leave_their_state_as_it_is():
    model = tiny.model(**SIZES)
    params = model.unstack(tiny.random_params(model))
    tokens = np.random.default_rng(0).integers(0, 101, (2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    segments = np.asarray([[1] * 5 + [0] * 4, [1] * 9], np.int32)
    extend = jax.jit(model.extend)
    _, cache = extend(params, tokens, positions, segments, model.empty_cache(2, 16))
    _, short = extend(params, tokens[:, :5], positions[:, :5], segments[:, :5], model.empty_cache(2, 16))
    for one, other in zip(jax.tree.leaves(cache.layers[0]), jax.tree.leaves(short.layers[0]), strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-6)
    asleep = np.asarray([[0], [1]], np.int32)
    _, after = extend(params, tokens[:, :1], np.asarray([[5], [9]], np.int32), asleep, cache)
    for one, other in zip(jax.tree.leaves(after.layers[0]), jax.tree.leaves(cache.layers[0]), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert np.any(one[1] != other[1])


def test_a_token_at_position_0_starts_from_a_state_of_zeros():
    model = tiny.model(**SIZES)
    params = model.unstack(tiny.random_params(model))
    empty = model.empty_cache(1, 8)
    used = empty._replace(layers=jax.tree.map(jnp.ones_like, empty.layers))
    tokens, positions, ones = np.asarray([[5, 7, 9]]), np.arange(3)[None], np.ones((1, 3), np.int32)
    seen, extend = [], jax.jit(model.extend)
    for cache in (empty, used):
        parts = []
        for at in (slice(0, 1), slice(1, 3)):
            hidden, cache = extend(params, tokens[:, at], positions[:, at], ones[:, at], cache)
            parts.append(hidden)
        seen.append(np.concatenate(parts, 1))
    np.testing.assert_array_equal(*seen)


def test_sharded_equals_single():
    """Rows, heads of keys and values, and parameters, each over two devices."""
    batch = tiny.packed_batch([[9, 20], [14, 14]] * 2, 32)
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", fsdp=2, data=2, tensor=2))
    single = tiny.model(**SIZES)
    assert_sharded_equals_single(single, batch, mesh, "fsdp_tensor")
