import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.mixing import Mixture
from jaxtrain.data.shards import COUNTERS, Reader, Shard
from jaxtrain.data.sources import DataError, Source

T = 16


@pytest.fixture
def opened(tmp_path):
    """A shard over rows of the lengths given; token 1 of a row is its number. `lengths` 0 makes a bad row."""

    def make(lengths, *, sources=1, epochs=1, **data):
        lines = [{"input_ids": [7, row, *[9] * (length - 2)][: length or 1]} for row, length in enumerate(lengths)]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        section = SourceSection(path=str(path), epochs=epochs)
        settings = DataSection(train=section, max_length=T, shuffle=False, **{"packing_bins": 2} | data)
        files = [Source(section) for _ in range(sources)]
        reader = Reader(files, settings, Encoder(None))
        return Shard(Mixture(files, seed=0, shuffle=False, shard=0, num_shards=1), reader, settings)

    return make


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


def contents(rows):
    return [row.tokens[row.positions == 1].tolist() for row in rows]


def test_rows_hold_every_example_once(opened, threads):
    lengths = [5, 9, 3, 16, 8, 2, 7, 11]
    rows = list(opened(lengths).rows(threads))
    assert sorted(number for row in contents(rows) for number in row if number != 0) == list(range(1, 8))
    assert sum(int((row.segment_ids > 0).sum()) for row in rows) == sum(lengths)


@pytest.mark.parametrize("at", range(6))
def test_a_state_resumes_within_a_row(opened, threads, at):
    lengths = [5, 9, 3, 16, 8, 2, 7, 11, 4, 6, 13, 30, 3]
    whole = list(opened(lengths, overlong="split").rows(threads))
    shard = opened(lengths, overlong="split")
    before = shard.rows(threads)
    list(itertools.islice(before, at))
    state = json.loads(json.dumps(shard.state()))
    assert at == 0 or state["open"] or at == len(whole)
    resumed = opened(lengths, overlong="split")
    resumed.restore(state)
    assert resumed.state() == state
    rest = list(resumed.rows(threads))
    assert len(rest) == len(whole) - at
    for row, expected in zip(rest, whole[at:], strict=True):
        np.testing.assert_array_equal(row.tokens, expected.tokens)


def test_events_are_counted(opened, threads):
    shard = opened([5, 40, 0, 4], on_bad_row="skip")
    with pytest.warns(UserWarning, match=r"a\.jsonl:3: "):
        list(shard.rows(threads))
    assert {name: shard.state()["next"][name] for name in COUNTERS} == {
        "truncated": 1,
        "dropped": 0,
        "split": 0,
        "bad_rows": 1,
    }


def test_an_error_comes_after_the_rows_before_it(opened, threads):
    rows = opened([16, 16, 0, 16]).rows(threads)
    assert [row.tokens[1] for row in itertools.islice(rows, 2)] == [0, 1]
    with pytest.raises(DataError, match=r"a\.jsonl:3: "):
        next(rows)


def test_a_state_that_does_not_fit_is_refused(opened, threads):
    shard = opened([5, 9, 3, 4])
    next(shard.rows(threads))
    with pytest.raises(ValueError, match=r"1 sources and data\.train has 2"):
        opened([5, 9, 3, 4], sources=2).check(shard.state())


def test_a_row_that_changed_since_the_state_was_saved_is_named(opened, threads):
    state = opened([40, 9], overlong="split").state()
    changed = opened([4, 9], overlong="split")
    changed.restore(state | {"open": [[[0, 0, 2]]]})  # the third piece of row 0
    with pytest.raises(DataError, match="row 0 of source 0 is not what it was"):
        list(changed.rows(threads))


def test_a_row_of_padding_has_the_arrays_of_the_others(opened, threads):
    shard = opened([5])
    (row,) = shard.rows(threads)
    padding = shard.padding()
    assert padding.arrays().keys() == row.arrays().keys() and not padding.segment_ids.any()
