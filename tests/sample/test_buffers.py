"""Buffers of another size hold what they held, as far as it is still there."""

import itertools

import numpy as np
import pytest
import tiny

from jaxtrain.sample import decode as programs
from jaxtrain.sample.buffers import Buffers

LENGTH, SLOTS = 300, 8
MODEL = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])


@pytest.fixture(scope="module")
def filled():
    """Buffers of which slot 2 holds a prompt of 40 tokens, and a copy of its keys and values."""
    params = tiny.random_params(MODEL)
    buffers = Buffers(MODEL, params, SLOTS, LENGTH)
    tokens = np.arange(40, dtype=np.int32)[None] + 1
    fresh = programs.prefill(MODEL, params, tokens, np.array([40], np.int32))
    buffers.insert(fresh, [0], [2], [40])
    return buffers, held(buffers, 2)


def held(buffers, slot, length=40):
    (layer,) = buffers.cache
    return [np.asarray(each)[slot, :length] for each in layer.all()]


def test_growing_and_shrinking_keeps_the_columns_that_fit(filled):
    buffers, before = filled
    for tokens in (LENGTH, 0, 150, 64):
        buffers.fit(tokens)
        assert buffers.columns >= tokens
        for now, then in zip(held(buffers, 2), before, strict=True):
            np.testing.assert_array_equal(now, then)
    assert np.abs(before[0]).min() > 0


def test_a_fork_and_a_move_copy_a_slot(filled):
    buffers, before = filled
    marks = np.arange(MODEL.config.vocab_size).astype(np.uint16)
    buffers.mark(marks, 2)
    buffers.fork([2], [5])
    buffers.move([2], [7])
    for slot in (2, 5, 7):
        for now, then in zip(held(buffers, slot), before, strict=True):
            np.testing.assert_array_equal(now, then)
    assert np.asarray(buffers.marks[7]).tolist() == marks.tolist() and not np.asarray(buffers.marks[5]).any()


def test_sizes_are_few_and_grow_by_at_most_a_half(filled):
    buffers, _ = filled
    for sizes in (buffers.lengths, buffers.prompt_lengths):
        assert sizes[-1] == LENGTH and list(sizes) == sorted(set(sizes))
        assert all(larger <= 1.5 * smaller for smaller, larger in itertools.pairwise(sizes))
