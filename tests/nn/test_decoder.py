import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtrain.nn import cache
from jaxtrain.nn.config import LayerKind, Rope
from jaxtrain.train.step import batch_norm, score

LOCAL = LayerKind(window=5, rope=Rope(theta=300.0))
MIXED = (LOCAL, tiny.KIND, LOCAL)
MODELS = {
    "full": tiny.model(),
    "windows": tiny.model(pattern=MIXED),
    # The norm of a head's output divides by it, so that outputs near 0 would show the rounding of large ones.
    "hybrid": tiny.model(
        pattern=(tiny.DELTA_KIND, tiny.DELTA_KIND, tiny.KIND), delta=tiny.DELTA, attention_gate=True, norm_eps=1e-3
    ),
}


def loss_and_grad(model, params, batch):
    def loss(params):
        return -jnp.sum(score(model, params, batch).logp * batch.loss_weights)

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(one, other, tolerance=1e-5):
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True):
        scale = np.abs(a).max() + 1e-6
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_packed_rows_equal_the_same_segments_alone(model):
    params = tiny.random_params(model)
    packed = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
    alone = []
    for row in range(2):
        for segment in range(1, packed.segment_ids[row].max() + 1):
            where = np.flatnonzero(packed.segment_ids[row] == segment)
            leaves = [leaf[row, where] for leaf in packed[:4]]
            alone.append([np.pad(leaf, (0, 32 - len(where))) for leaf in leaves])
    unpacked = packed._replace(**dict(zip(packed._fields, map(np.stack, zip(*alone, strict=True)), strict=False)))

    scored = jax.jit(score, static_argnums=0)
    together, apart = (np.asarray(scored(model, params, batch).logp) for batch in (packed, unpacked))
    weighted = packed.loss_weights > 0
    np.testing.assert_allclose(together[weighted], apart[unpacked.loss_weights > 0], atol=1e-5)
    assert_close(loss_and_grad(model, params, packed), loss_and_grad(model, params, unpacked))


def test_layers_without_a_loop_are_the_same():
    batch = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
    model = tiny.model(pattern=MIXED)
    unrolled = dataclasses.replace(model, run=dataclasses.replace(model.run, unroll=True))
    params = tiny.random_params(model)
    assert_close(loss_and_grad(model, params, batch), loss_and_grad(unrolled, params, batch))


@pytest.mark.parametrize("order", [cache.ON_TPU, cache.OFF_TPU], ids=["on-tpu", "off-tpu"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_cached_decoding_equals_the_whole_row(model, order):
    params = tiny.random_params(model)
    batch = tiny.packed_batch([[20], [20]], 20)
    whole = jax.jit(model.hidden)(params, batch)
    params, extend = model.unstack(params), jax.jit(model.extend)
    tokens, positions, segments = batch.tokens, batch.positions, batch.segment_ids
    seen = cache.empty_cache(model.config, 2, 24, model.run.dtype, order)
    hidden, seen = extend(params, tokens[:, :7], positions[:, :7], segments[:, :7], seen)
    parts = [hidden]
    for t in range(7, 20):
        at = slice(t, t + 1)
        hidden, seen = extend(params, tokens[:, at], positions[:, at], segments[:, at], seen)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_is_inert(tied):
    model = tiny.model(tied=tied)
    wider = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_multiple=256))
    params = tiny.random_params(model)
    grown = jax.tree.map(lambda leaf: leaf, params)
    extra = wider.config.padded_vocab - model.config.padded_vocab
    grown["embed"]["weight"] = jnp.pad(params["embed"]["weight"], ((0, extra), (0, 0)))
    if not tied:
        grown["lm_head"]["kernel"] = jnp.pad(params["lm_head"]["kernel"], ((0, 0), (0, extra)))
    batch = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
    value, _ = loss_and_grad(model, params, batch)
    grown_value, grads = loss_and_grad(wider, grown, batch)
    np.testing.assert_allclose(value, grown_value, rtol=1e-6)
    assert not np.any(grads["embed"]["weight"][model.config.vocab_size :])


def test_batch_norm_counts_tokens_and_segments_with_weight():
    batch = tiny.packed_batch([[9, 20, 3], [14, 1]], 32)
    norm = batch_norm(batch)
    weighted = {(row, segment) for row, segment in zip(*np.nonzero(batch.loss_weights > 0), strict=True)}
    segments = {(row, batch.segment_ids[row, column]) for row, column in weighted}
    assert norm.tokens == batch.loss_weights.sum()
    assert norm.segments == len(segments) == 4  # the segment of one token has none to predict
