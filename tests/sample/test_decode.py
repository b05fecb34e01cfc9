"""The engine's programs on buffers: a prefill is padded without effect, and copies are what was copied."""

import jax
import numpy as np
import pytest
import tiny

from jaxtrain.sample import decode as programs

MODEL = tiny.model(num_layers=1, pattern=tiny.CONFIG.pattern[:1])
TOKENS = np.random.default_rng(0).integers(0, 101, (2, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(MODEL)


def rows(layers):
    (layer,) = layers
    return [np.asarray(each) for each in layer.all()]


def test_a_prefill_does_not_depend_on_its_padding(params):
    lengths = np.array([10, 4], np.int32)
    short = rows(programs.prefill(MODEL, params, TOKENS, lengths))
    padded = rows(programs.prefill(MODEL, params, np.pad(TOKENS, ((0, 2), (0, 22))), np.pad(lengths, (0, 2))))
    for one, other in zip(short, padded, strict=True):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(one[row, :length], other[row, :length], atol=1e-5)


def test_options_of_the_compiler_reach_it(params):
    assert programs.with_options(()) == (programs.prefill, programs.decode)
    prefill, _ = programs.with_options((("xla_cpu_enable_fast_math", False),))
    lengths = np.array([10, 4], np.int32)
    expected = rows(programs.prefill(MODEL, params, TOKENS, lengths))
    jax.tree.map(np.testing.assert_array_equal, rows(prefill(MODEL, params, TOKENS, lengths)), expected)
    refused, _ = programs.with_options((("xla_no_such", True),))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such"):
        refused(MODEL, params, TOKENS, lengths)


def test_rows_go_into_their_slots_and_other_slots_stay(params):
    fresh = programs.prefill(MODEL, params, TOKENS, np.array([10, 4], np.int32))
    empty = MODEL.empty_cache(6, 16).layers
    places = (np.array(each, np.int32) for each in ([1, 0, 0], [4, 2, 0], [4, 10, 0]))
    found = rows(programs.insert(MODEL, empty, fresh, *places, np.int32(2)))  # the third is none
    for cache, new in zip(found, rows(fresh), strict=True):
        np.testing.assert_array_equal(cache[2, :10], new[0])
        np.testing.assert_array_equal(cache[4, :4], new[1, :4])
        assert not cache[[0, 1, 3, 5]].any()


def test_a_buffer_that_grew_and_was_cut_again_is_as_it_was(params):
    (layer,) = programs.prefill(MODEL, params, TOKENS, np.array([10, 10], np.int32))
    larger = programs.resize(MODEL, layer, 5, 33)
    assert larger.columns == 33
    again = programs.resize(MODEL, larger, 2, 10)
    jax.tree.map(np.testing.assert_array_equal, again, layer)


def test_marks_move_with_their_slots():
    marks = np.arange(12, dtype=np.uint16).reshape(4, 3)
    places = np.array([3, 0], np.int32), np.array([1, 0], np.int32)
    moved = programs.move_marks(jax.numpy.array(marks), *places, np.int32(1))  # the second is none
    assert np.asarray(moved).tolist() == [marks[0].tolist(), marks[3].tolist(), marks[2].tolist(), marks[3].tolist()]
