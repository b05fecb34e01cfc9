import time
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import tiny

from jaxtrain.lora import join
from jaxtrain.nn.config import LayerKind
from jaxtrain.observe.flops import (
    mfu,
    peak_flops,
    peak_memory_bytes,
    segment_lengths,
    train_flops,
    visible_pairs,
)

LENGTHS = [[9, 20, 3], [14, 1], [32], []]
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_heads": 8, "head_dim": 64, "vocab_size": 8192}
ONE_LAYER = {"num_layers": 1, "pattern": (tiny.KIND,)}  # XLA counts the body of a loop once


def flops(batch, config=tiny.CONFIG, lora=None):
    return train_flops(config, batch.segment_ids, batch.loss_weights, lora)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lora", [None, tiny.LORA])
def test_a_packed_batch_costs_the_sum_of_its_segments(window, lora):
    local = LayerKind(window, None)
    config = replace(tiny.CONFIG, pattern=(local, tiny.KIND, local))
    packed = tiny.packed_batch(LENGTHS, 32)
    alone = 0.0
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum([0, *lengths])
        for start, stop in pairwise(ends):
            segment = jax.tree.map(lambda leaf, r=row, s=slice(start, stop): leaf[r : r + 1, s], packed)
            alone += flops(segment, config, lora)
    assert flops(packed, config, lora) == alone


def test_segment_lengths_are_those_that_were_packed():
    assert segment_lengths(tiny.packed_batch(LENGTHS, 32).segment_ids).tolist() == [9, 20, 3, 14, 1, 32]


def test_padding_costs_nothing():
    assert flops(tiny.packed_batch(LENGTHS, 32)) == flops(tiny.packed_batch(LENGTHS, 100))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visible_pairs_are_those_of_the_mask(window):
    lengths = np.array([1, 3, 4, 5, 30])
    expected = 0
    for n in lengths:
        distance = np.arange(n)[:, None] - np.arange(n)
        expected += np.count_nonzero((distance >= 0) & (distance < (window or n)))
    assert visible_pairs(lengths, window) == expected


def test_tokens_without_weight_skip_the_head_only():
    batch = tiny.packed_batch([[32]], 32)
    none = batch._replace(loss_weights=np.zeros_like(batch.loss_weights))
    every = batch._replace(loss_weights=np.ones_like(batch.loss_weights))
    head = 6 * tiny.CONFIG.hidden_size * tiny.CONFIG.vocab_size
    assert flops(every) - flops(none) == 31 * head  # nothing predicts a row's first token


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model_costs_what_xla_counts(tied):
    model = tiny.model(tied=tied, **SIZES, **ONE_LAYER)
    batch = all_weighted_batch()
    assert xla_flops(model, batch, model.abstract(), {}) == pytest.approx(flops(batch, model.config), rel=0.01)


@pytest.mark.parametrize("full", [(), ("lm_head.kernel", "layers.mlp.gate_proj.kernel")])
def test_frozen_weights_cost_what_xla_counts(full):
    model = tiny.model(lora=replace(tiny.LORA, full_paths=full), tied=False, **SIZES, **ONE_LAYER)
    trained, frozen = model.split(model.abstract())
    # The gradient that reaches the embedding is computed in a model of many layers: for the layers above the first.
    trained |= {"embed": frozen.pop("embed")}
    batch = all_weighted_batch()
    counted = flops(batch, model.config, model.lora)
    assert xla_flops(model, batch, trained, frozen) == pytest.approx(counted, rel=0.01)
    assert counted < (0.9 if full else 0.7) * flops(batch, model.config)


def test_attention_costs_what_xla_counts():
    length, heads, width = 256, 4, 64

    def attention(q, k, v):
        return jnp.square(jnp.einsum("bnts,bsnh->btnh", jnp.einsum("btnh,bsnh->bnts", q, k), v)).sum()

    one = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
    compiled = jax.jit(jax.grad(attention, argnums=(0, 1, 2))).lower(one, one, one)
    config = replace(tiny.CONFIG, num_heads=heads, head_dim=width, **ONE_LAYER)
    segments, unweighted = np.ones((1, length), np.int32), np.zeros((1, length))
    matrices = train_flops(config, np.arange(1, length + 1)[None], unweighted) - length * 12 * heads * width
    ours = train_flops(config, segments, unweighted) - matrices
    # XLA computes every pair here, we count those that a causal mask leaves.
    every_pair = ours * length**2 / visible_pairs(np.array([length]), None)
    assert compiled.cost_analysis()["flops"] == pytest.approx(every_pair, rel=0.01)


def all_weighted_batch():
    # Short rows: XLA computes the pairs that a causal mask hides, and we do not count them.
    batch = tiny.packed_batch([[16]] * 16, 16, vocab_size=SIZES["vocab_size"])
    return batch._replace(loss_weights=np.ones_like(batch.loss_weights))


def xla_flops(model, batch, trained, frozen):
    """Of forward and backward with the plain head, which computes nothing twice."""

    def loss(trained, frozen):
        params = join(trained, frozen)
        logits = model.logits(params, model.hidden(params, batch)[:, :-1])
        return jax.nn.log_softmax(logits)[..., 0].sum()

    return jax.jit(jax.grad(loss)).lower(trained, frozen).compile().cost_analysis()["flops"]


def test_layers_add_up():
    batch = tiny.packed_batch(LENGTHS, 32)

    def deep(layers):
        return flops(batch, replace(tiny.CONFIG, num_layers=layers, pattern=(tiny.KIND,) * layers))

    assert deep(7) - deep(5) == 2 * (deep(2) - deep(1)) > 0


def test_counting_a_large_batch_takes_a_blink():
    segments = np.sort(np.random.default_rng(0).integers(1, 40, (8, 8192)).astype(np.int32))
    weights = np.ones(segments.shape, np.float32)

    def seconds():
        start = time.perf_counter()
        train_flops(tiny.CONFIG, segments, weights)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 1e-3


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_by_device_kind(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v5x", "NVIDIA GeForce RTX 4090"])
def test_no_peak_is_invented(kind):
    assert peak_flops(kind) is None


def test_no_mfu_on_a_cpu():
    assert mfu(1e12, 1.0) is None


def test_peak_memory_on_a_cpu_is_that_of_the_process():
    resident = psutil.Process().memory_info().rss
    assert 0.99 * resident <= peak_memory_bytes() < psutil.virtual_memory().total
