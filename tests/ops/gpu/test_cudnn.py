import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.blockwise import RESIDUALS, AttentionOptions, MaskInputs, blockwise_attention
from jaxtrain.ops.gpu import cudnn
from jaxtrain.ops.gpu.cudnn import packed_attention, segment_table


def test_the_table_has_the_start_and_length_of_every_run():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 3, 4, 5, 6]])
    starts, lengths, counts = segment_table(ids, 4)
    np.testing.assert_array_equal(counts, [3, 6])
    np.testing.assert_array_equal(starts[0], [0, 3, 5, -1, -1])
    np.testing.assert_array_equal(lengths[0], [3, 2, 1, -1])
    np.testing.assert_array_equal(lengths[1], [1, 1, 1, 1])  # more than the limit: the caller sees it by the count


def outputs_and_gradients(attention, sinks):
    keys = jax.random.split(jax.random.key(1), 5)
    q, g = (jax.random.normal(key, (2, 48, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 48, 2, 8)) for key in keys[2:4])
    ids = jnp.repeat(jnp.array([[1, 2, 3, 0], [1, 1, 2, 2]]), 12, axis=1)
    out, back = jax.vjp(lambda q, k, v, sinks: attention(q, k, v, ids, sinks), q, k, v, sinks)
    return [out, *(each for each in back(g) if each is not None)]


@pytest.mark.parametrize("sinks", [None, jnp.array([-1.0, 0.5, 2.0, 4.0])], ids=["plain", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
def test_the_wrapper_computes_what_xla_computes(monkeypatch, sinks, window):
    """Its maths, in float32, with a stand-in that keeps what cuDNN's kernels promise."""
    cudnn_stand_in.install(monkeypatch, cudnn.kernels)
    options = AttentionOptions(0.3, window)

    def ours(q, k, v, ids, sinks):
        return packed_attention(q, k, v, ids, sinks, options, 8)

    def xla(q, k, v, ids, sinks):
        places = jnp.broadcast_to(jnp.arange(48), ids.shape)
        return blockwise_attention(q, k, v, sinks, MaskInputs(places, ids), options)

    found, expected = outputs_and_gradients(ours, sinks), outputs_and_gradients(xla, sinks)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_remat_policy_keeps_the_residuals_of_the_kernel(monkeypatch):
    cudnn_stand_in.install(monkeypatch, cudnn.kernels)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return cudnn_stand_in.forward(*arguments)

    monkeypatch.setattr(cudnn.kernels, "_dot_product_attention_fwd_rule", counted)

    def exponentials(policy):
        def attention(q, k, v, ids, sinks):
            return packed_attention(q, k, v, ids, sinks, AttentionOptions(0.3), 8)

        kept = jax.checkpoint(attention, policy=policy)
        return str(jax.make_jaxpr(lambda: outputs_and_gradients(kept, None))()).count("= exp ")

    saved = exponentials(jax.checkpoint_policies.save_only_these_names(RESIDUALS))
    assert calls and saved < exponentials(jax.checkpoint_policies.nothing_saveable)
