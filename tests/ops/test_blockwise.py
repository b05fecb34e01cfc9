import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs, blockwise_attention


def inputs(length):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    index = jnp.arange(length)[None]
    segments = jnp.where(index < length // 3, 1, 2)
    return (q, k, v), MaskInputs(index, segments)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("length", [30, 37])
def test_the_size_of_a_block_does_not_matter(length, window):
    arrays, tokens = inputs(length)

    def loss(block):
        spec = AttentionOptions(0.3, window, block=block)

        def value(q, k, v):
            return jnp.sin(blockwise_attention(q, k, v, None, tokens, spec)).sum()

        return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(*arrays)

    for one, other in zip(jax.tree.leaves(loss(length)), jax.tree.leaves(loss(8)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_query_without_any_key_gives_zero():
    (q, k, v), tokens = inputs(9)
    nothing = tokens._replace(kv_pos=tokens.q_pos, kv_seg=jnp.full_like(tokens.q_seg, -1))
    spec = AttentionOptions(0.3, block=4)
    np.testing.assert_array_equal(blockwise_attention(q, k, v, None, nothing, spec), np.zeros(q.shape))
