"""Random queries, keys and values over packed rows, and how two attentions are compared."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.ops import attend as attention_kernels
from jaxtrain.ops.blockwise import AttentionOptions, MaskInputs

SCALE = 0.3
SINKS = np.linspace(-1, 2, 4, dtype=np.float32)
VARIANTS = {
    "causal": {},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "everything": {"window": 150, "softcap": 3.0, "sinks": SINKS},
}


def tensors(rows=2, length=300, heads=4, kv_heads=2, width=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, length, count, width) for count in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def packed(lengths, length):
    """Segments 1.. of the given lengths, then padding: positions and segment ids [1, T]."""
    segments = np.zeros((1, length), np.int32)
    positions = np.zeros((1, length), np.int32)
    start = 0
    for number, size in enumerate(lengths, 1):
        segments[0, start : start + size] = number
        positions[0, start : start + size] = np.arange(size)
        start += size
    return positions, segments


def value_and_gradients(attention, arrays, variant, **where):
    """Outputs, and the gradients by q, k, v and (if given) the sinks, of a loss that weighs each output its own way."""
    fixed = {name: value for name, value in variant.items() if name != "sinks"}
    trained = [*arrays, *(jnp.asarray(value) for name, value in variant.items() if name == "sinks")]
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)

    def loss(q, k, v, *sinks):
        out = attention(q, k, v, **fixed, **({"sinks": sinks[0]} if sinks else {}), **where)
        return (out * weights).sum(), out

    grads, out = jax.jit(jax.grad(loss, tuple(range(len(trained))), has_aux=True))(*trained)
    return [out, *grads]


def assert_close(ours, theirs, atol=1e-5):
    names = ("out", "q", "k", "v", "sinks")[: len(theirs)]  # the sinks are last, and only of some variants
    for name, a, b in zip(names, ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


def attend(q, k, v, *, window=None, softcap=None, **rest):
    tokens = MaskInputs(**{name: rest.pop(name) for name in MaskInputs._fields if name in rest})
    return attention_kernels.attend(q, k, v, tokens, AttentionOptions(SCALE, window, softcap), **rest)


def attending(**options):
    return lambda *arrays, **rest: attend(*arrays, **options, **rest)


def only_real(attention, q_seg):
    """`attention` with padding's own outputs at 0: only that nobody else sees padding is promised."""
    real = jnp.asarray(q_seg > 0, jnp.float32)[..., None, None]
    return lambda *arrays, **rest: attention(*arrays, **rest) * real
