import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problem import (
    SCALE,
    SINKS,
    VARIANTS,
    assert_close,
    attend,
    attending,
    only_real,
    packed,
    tensors,
    value_and_gradients,
)

from jaxtrain.config import MeshSection
from jaxtrain.ops.blockwise import RESIDUALS
from jaxtrain.ops.gpu.cudnn import segment_table
from jaxtrain.parallel.mesh import make_mesh


def two_rows(length=300):
    rows = [packed([90, 1, 150, length - 300 + 40], length), packed([length], length)]
    return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


def plain(q, k, v, *, q_pos, q_seg, window=None, softcap=None, sinks=None):
    """The definition, with everything materialised. Needs a key for every query."""
    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * SCALE
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = q_pos[:, None, :, None] - q_pos[:, None, None, :]
    seen = (q_seg[:, None, :, None] == q_seg[:, None, None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    # Padding has positions of 0 all over: by position alone it would see itself in both directions.
    index = np.arange(q.shape[1])
    seen &= index[:, None] >= index
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(jnp.asarray(sinks)[:, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sink], -1)
    weights = jax.nn.softmax(scores, -1)[..., : k.shape[1]]
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize(
    ("variant", "length"),
    [(name, 300) for name in VARIANTS] + [("everything", 1100)],  # the last: bands of several blocks
)
def test_xla_is_the_definition(variant, length):
    q_pos, q_seg = two_rows(length)
    ours, theirs = (
        value_and_gradients(
            only_real(attention, q_seg), tensors(length=length), VARIANTS[variant], q_pos=q_pos, q_seg=q_seg
        )
        for attention in (attending(impl="xla"), plain)
    )
    assert_close(ours, theirs, atol=3e-5)


@pytest.mark.parametrize("variant", [VARIANTS["causal"], VARIANTS["everything"]], ids=["causal", "everything"])
def test_a_packed_segment_is_the_segment_alone(variant):
    arrays = tensors(rows=1)
    q_pos, q_seg = packed([90, 1, 150, 40], 300)
    together = attend(*arrays, q_pos=q_pos, q_seg=q_seg, impl="xla", **variant)
    for start, size in ((0, 90), (90, 1), (91, 150), (241, 40)):
        span = slice(start, start + size)
        q_pos, q_seg = packed([size], size)
        alone = attend(*(x[:, span] for x in arrays), q_pos=q_pos, q_seg=q_seg, impl="xla", **variant)
        np.testing.assert_allclose(together[:, span], alone, atol=1e-6)


@pytest.mark.parametrize("variant", [VARIANTS["causal"], VARIANTS["everything"]], ids=["causal", "everything"])
def test_a_cache_in_any_order_gives_the_last_tokens_of_the_whole_row(variant):
    q, k, v = tensors(rows=1)
    q_pos, q_seg = packed([300], 300)
    whole = attend(q, k, v, q_pos=q_pos, q_seg=q_seg, impl="xla", **variant)
    order = np.random.default_rng(1).permutation(300)
    free = 20  # slots that hold nothing yet: another segment
    k, v = (jnp.pad(x[:, order], ((0, 0), (0, free), (0, 0), (0, 0)), constant_values=7.0) for x in (k, v))
    kv_pos = np.concatenate([order, np.arange(300, 300 + free)])[None]
    kv_seg = np.concatenate([np.ones(300, int), np.zeros(free, int)])[None]
    last = slice(297, 300)
    few = attend(
        *(q[:, last], k, v),
        q_pos=q_pos[:, last],
        q_seg=q_seg[:, last],
        kv_pos=kv_pos,
        kv_seg=kv_seg,
        **variant,
    )
    np.testing.assert_allclose(few, whole[:, last], atol=1e-6)


def test_a_query_that_sees_no_key_gets_zero_and_no_gradient():
    arrays = tensors(rows=1, length=5)
    seg, nobody = np.ones((1, 5), int), np.zeros((1, 5), int)
    where = {"q_pos": np.arange(5)[None], "q_seg": seg, "kv_pos": np.arange(5)[None], "kv_seg": nobody}
    for result in value_and_gradients(attending(impl="xla"), arrays, {}, **where):
        np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("impl", ["xla", "splash"])
def test_padding_is_finite_and_nobody_sees_it(impl):
    arrays = tensors(length=140)
    empty, half = packed([], 140), packed([60], 140)
    q_pos, q_seg = (np.concatenate(parts) for parts in zip(empty, half, strict=True))
    where = {"q_pos": q_pos, "q_seg": q_seg}
    results = value_and_gradients(attending(impl=impl), arrays, {"sinks": SINKS}, **where)
    assert all(np.isfinite(result).all() for result in results)
    padding = (q_seg == 0)[..., None, None]
    other = [jnp.where(padding, 1e4, x) for x in arrays]
    changed = attend(*other, impl=impl, sinks=jnp.asarray(SINKS), **where)
    np.testing.assert_array_equal(changed[1, :60], results[0][1, :60])
    assert np.isfinite(changed).all()


@pytest.mark.parametrize("variant", ["causal", "everything"])
def test_splash_equals_xla(variant):
    """The kernel that TPUs run, interpreted: a row length and head width that are no multiples of the register's."""
    q_pos, q_seg = two_rows()
    xla, splash = (
        value_and_gradients(
            only_real(attending(impl=impl), q_seg), tensors(), VARIANTS[variant], q_pos=q_pos, q_seg=q_seg
        )
        for impl in ("xla", "splash")
    )
    assert_close(xla, splash, atol=3e-5)


@pytest.mark.parametrize("impl", ["xla", "splash"])
def test_a_mesh_changes_nothing(impl):
    mesh = make_mesh(MeshSection(preset="fsdp_tensor", data=2, fsdp=2, tensor=2))
    arrays = tensors(rows=4, length=128)
    q_pos, q_seg = (np.repeat(x, 4, 0) for x in packed([100, 28], 128))
    where = {"q_pos": q_pos, "q_seg": q_seg}
    single, sharded = (
        value_and_gradients(attending(impl=impl, mesh=m), arrays, {"sinks": SINKS}, **where) for m in (None, mesh)
    )
    assert_close(single, sharded)


def test_no_scores_of_a_whole_row_are_ever_held():
    length, heads = 4096, 4
    arrays = tensors(rows=1, length=length, kv_heads=2)
    q_pos, q_seg = packed([length], length)

    def loss(q, k, v):
        return attend(q, k, v, q_pos=q_pos, q_seg=q_seg, impl="xla").sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
    scores_of_all_heads = length * length * heads * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores_of_all_heads / 4


def test_keys_in_the_causal_future_of_packed_rows_are_not_computed():
    arrays = tensors(rows=1, length=1024)
    q_pos, q_seg = packed([1024], 1024)

    def flops(**kv):
        run = jax.jit(lambda *a: attend(*a, q_pos=q_pos, q_seg=q_seg, impl="xla", **kv))
        return run.lower(*arrays).compile().cost_analysis()["flops"]

    # The cache form, where order says nothing, walks its blocks in a loop, whose body is counted once: 8 of them.
    every_key = 8 * flops(kv_pos=q_pos, kv_seg=q_seg)
    assert flops() < 0.6 * every_key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 0}, "window=0"),
        ({"kv_pos": np.zeros((2, 300), int)}, "both kv_pos and kv_seg"),
        ({"kv_pos": np.zeros((2, 300), int), "kv_seg": np.zeros((2, 300), int), "impl": "splash"}, "packed rows only"),
        ({"impl": "cudnn"}, "16-bit floats .*float32"),
    ],
)
def test_what_cannot_be_asked_is_an_error(changes, words):
    q_pos, q_seg = two_rows()
    with pytest.raises(ValueError, match=words):
        attend(*tensors(), **{"q_pos": q_pos, "q_seg": q_seg, **changes})


def test_shapes_that_do_not_fit_are_named():
    q, k, v = tensors(heads=3)
    q_pos, q_seg = two_rows()
    with pytest.raises(ValueError, match=r"q \(2, 300, 3, 8\), k \(2, 300, 2, 8\)"):
        attend(q, k, v, q_pos=q_pos, q_seg=q_seg)
    with pytest.raises(ValueError, match="299 keys for 300 queries"):
        attend(q[:, :, :2], k[:, 1:], v[:, 1:], q_pos=q_pos, q_seg=q_seg)


def test_a_segment_table_covers_every_token_and_counts_what_does_not_fit():
    """What cuDNN is told of the rows; the kernel itself needs a GPU."""
    rows = jnp.asarray([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 2, 3, 4, 0]])
    starts, lengths, count = segment_table(rows, 3)
    np.testing.assert_array_equal(starts[:3], [[0, 2, 3, -1], [0, -1, -1, -1], [0, -1, -1, -1]])
    np.testing.assert_array_equal(lengths[:3], [[2, 1, 2], [5, -1, -1], [5, -1, -1]])
    np.testing.assert_array_equal(count, [3, 1, 1, 5])


def test_a_remat_policy_can_save_the_forward_pass():
    arrays = tensors(rows=1, length=128)
    q_pos, q_seg = packed([128], 128)

    def exponentials(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def attention(q, k, v):
            return attend(q, k, v, q_pos=q_pos, q_seg=q_seg, impl="xla")

        gradient = jax.grad(lambda *qkv: jnp.sin(attention(*qkv)).sum(), (0, 1, 2))
        return str(jax.make_jaxpr(gradient)(*arrays)).count("= exp ")

    saved = exponentials(jax.checkpoint_policies.save_only_these_names(RESIDUALS))
    assert saved < exponentials(jax.checkpoint_policies.nothing_saveable)
