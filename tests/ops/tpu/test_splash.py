import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs, SplashBlocks, blockwise_attention
from jaxtrain.ops.tpu import splash as module
from jaxtrain.ops.tpu.splash import splash_attention


@pytest.mark.parametrize("window", [None, 20])
def test_interpreted_splash_equals_blockwise_attention(window):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 130, heads, 64)), jnp.float32) for heads in (2, 1, 1))
    index = jnp.arange(130)[None]
    segments = jnp.where(index < 50, 1, 2)
    options = AttentionOptions(0.3, window, block=64)
    actual = splash_attention(q, k, v, segments, options, sinks=None, mesh=None, interpret=True)
    expected = blockwise_attention(q, k, v, None, MaskInputs(index, segments), options)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "two kernels"])
def test_gradients_are_those_of_blockwise_attention_over_several_blocks_of_keys(fused):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, heads, 64)), jnp.float32) for heads in (2, 1, 1))
    sinks = jnp.asarray(rng.normal(size=2), jnp.float32)
    index = jnp.broadcast_to(jnp.arange(256), (2, 256))
    segments = jnp.stack([jnp.where(index[0] < 150, 1, 2), jnp.where(index[0] < 40, 1, 2)])
    options = AttentionOptions(0.3, block=64, splash=SplashBlocks(128, 128, 128, 128, fused))

    def splash(q, k, v, sinks):
        return splash_attention(q, k, v, segments, options, sinks=sinks, mesh=None, interpret=True)

    def blockwise(q, k, v, sinks):
        return blockwise_attention(q, k, v, sinks, MaskInputs(index, segments), options)

    found, expected = (
        jax.grad(lambda *given, of=of: jnp.sum(jnp.sin(of(*given))), (0, 1, 2, 3))(q, k, v, sinks)
        for of in (splash, blockwise)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_only_causal_rows_that_are_not_too_long_have_the_fused_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "_kernel", lambda order, heads, blocks, *given, **named: seen.append(blocks) or zero)
    monkeypatch.setattr(module, "_attended", lambda attention, q, *given: q)
    zero = jnp.zeros(())
    for length, window in ((8192, None), (8192, 512), (32768, None)):
        q, segments = jnp.zeros((1, length, 1, 8)), jnp.ones((1, length), jnp.int32)
        options = AttentionOptions(0.3, window)
        splash_attention(q, q, q, segments, options, sinks=None, mesh=None, interpret=True)
    assert [blocks.use_fused_bwd_kernel for blocks in seen] == [True, False, False]
    assert seen[0].block_kv_dkv == 2048 and seen[1].block_kv_dkv == 1024
