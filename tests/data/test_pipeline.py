import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream, count_shards, eval_batches
from jaxtrain.data.sources import DataError
from jaxtrain.types import Batch

ENCODE = Encoder(None)
T = 64


@pytest.fixture
def source(tmp_path):
    """A file of `rows` random sequences in which token 1 is the number of the row."""

    def make(rows, longest=40, name="a.jsonl", prompt=0, **section):
        rng = np.random.default_rng(rows)
        lines = [[0, row, *rng.integers(1000, 2000, rng.integers(1, longest)).tolist()] for row in range(rows)]
        path = tmp_path / name
        masks = [
            {"completion_mask": [0] * prompt + [1] * (len(line) - prompt)} if 0 < prompt < len(line) else {}
            for line in lines
        ]
        path.write_text(
            "".join(json.dumps({"input_ids": line} | mask) + "\n" for line, mask in zip(lines, masks, strict=True))
        )
        return SourceSection(path=str(path), **section)

    return make


def stream(sources, *, rows=8, shards=range(8), num_shards=8, seed=0, **data):
    sources = sources if isinstance(sources, list) else [sources]
    section = DataSection(train=sources, **{"max_length": T, "packing_bins": 4} | data)
    return TrainStream(sources, section, ENCODE, rows=rows, seed=seed, shards=shards, num_shards=num_shards)


def take(batches, count=None):
    return list(itertools.islice(batches, count))


def same(left, right):
    def equal(one, other):
        return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)

    return len(left) == len(right) and all(equal(a.arrays(), b.arrays()) for a, b in zip(left, right, strict=True))


def concatenated(*hosts):
    def joined(batches):
        columns = [batch.arrays() for batch in batches]
        return Batch.from_arrays({name: np.concatenate([each[name] for each in columns]) for name in columns[0]})

    return [joined(batches) for batches in zip(*hosts, strict=True)]


def host_shards(host, hosts, num_shards):
    """Equal runs, in order."""
    each = num_shards // hosts
    return range(host * each, (host + 1) * each)


def row_numbers(batches):
    return [int(n) for b in batches for n in b.tokens[(b.positions == 1) & (b.segment_ids > 0)]]


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_hosts(source, hosts):
    section = source(300)
    with stream(section, rows=16) as whole:
        expected = take(whole, 20)
    parts = []
    for host in range(hosts):
        with stream(section, rows=16, shards=host_shards(host, hosts, 8)) as part:
            parts.append(take(part, 20))
    assert same(concatenated(*parts), expected)


@pytest.mark.parametrize(
    "data",
    [{}, {"packing": False}, {"overlong": "split"}, {"overlong": "keep_completion"}],
    ids=["packed", "unpacked", "split", "keep_completion"],
)
@pytest.mark.parametrize("at", [0, 1, 7, 25])
def test_a_resumed_stream_is_the_uninterrupted_one_bit_for_bit(source, data, at):
    section = source(200, longest=150, prompt=60)
    with stream(section, **data) as whole:
        expected = take(whole, 40)
        expected_stats = whole.stats
    counted = {"split": "split", "keep_completion": "prompt_truncated"}.get(data.get("overlong"), "truncated")
    assert expected_stats[counted] > 5
    with stream(section, **data) as before:
        take(before, at)
        time.sleep(0.05)  # let the threads run ahead of what was handed out
        state = json.loads(json.dumps(before.get_state()))
    with stream(section, **data) as after:
        after.set_state(state)
        assert after.get_state() == state
        assert same(take(after, 40 - at), expected[at:])
        assert after.stats == expected_stats


def test_a_resumed_stream_may_run_on_another_number_of_hosts(source):
    section = [source(90), source(30, name="b.jsonl", weight=0.3)]
    with stream(section) as whole:
        expected = take(whole, 30)
    states = {}
    for host in range(2):
        with stream(section, shards=host_shards(host, 2, 8)) as part:
            take(part, 11)
            states |= part.get_state()
    parts = []
    for host in range(4):
        with stream(section, shards=host_shards(host, 4, 8)) as part:
            part.set_state(states)
            parts.append(take(part, 19))
    assert same(concatenated(*parts), expected[11:])


def test_a_stream_can_be_set_back_and_closed_while_it_runs(source):
    with stream(source(200)) as batches:
        expected = take(batches, 5)
        state = batches.get_state()
        expected += take(batches, 10)
        batches.set_state(state)
        assert same(take(batches, 4), expected[5:9])
        batches.close()
        assert same(take(batches, 6), expected[9:])


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("data", [{}, {"packing": False}], ids=["packed", "unpacked"])
def test_finite_sources_give_every_row_once_an_epoch_and_end(source, rows, data):
    with stream(source(rows, epochs=2), **data) as batches:
        everything = take(batches)
        assert sorted(row_numbers(everything)) == sorted([*range(rows)] * 2)
        assert all(batch.tokens.shape == (8, T) for batch in everything)
        with pytest.raises(StopIteration):
            next(batches)


def test_a_finite_stream_resumes_up_to_its_end(source):
    section = source(60, epochs=1)
    with stream(section) as whole:
        expected = take(whole)
    for at in range(len(expected) + 1):
        with stream(section) as before, stream(section) as after:
            take(before, at)
            after.set_state(before.get_state())
            assert same(take(after), expected[at:])


def test_fewer_rows_than_shards_go_on_for_ever(source):
    with stream(source(3)) as batches:
        numbers = row_numbers(take(batches, 30))
    assert set(numbers) == {0, 1, 2}


def test_batches_obey_the_convention(source):
    with stream(source(300)) as batches:
        for batch in take(batches, 10):
            starts = (batch.positions == 0) & (batch.segment_ids > 0)
            assert not batch.loss_weights[starts].any()
            assert (batch.loss_weights[(batch.segment_ids > 0) & ~starts] == 1).all()
            assert not batch.loss_weights[batch.segment_ids == 0].any()
            assert (np.diff(batch.segment_ids, axis=1) <= 1).all() and (batch.segment_ids[:, 0] == 1).all()
            assert {name: array.dtype for name, array in batch.arrays().items()} == {
                "tokens": np.int32,
                "positions": np.int32,
                "segment_ids": np.int32,
                "loss_weights": np.float32,
                "bundle_ids": np.int32,
            }
            np.testing.assert_array_equal(batch.bundle_ids, batch.segment_ids)


def test_without_packing_every_row_holds_one_example(source):
    with stream(source(50), packing=False) as batches:
        assert all((batch.segment_ids.max(axis=1) == 1).all() for batch in take(batches, 5))


def test_the_seed_decides_and_nothing_else(source):
    section = source(300)
    with stream(section, seed=1) as a, stream(section, seed=1, workers=7) as b, stream(section, seed=2) as c:
        first, again, other = take(a, 10), take(b, 10), take(c, 10)
    assert same(first, again) and not same(first, other)


def test_stats_count_what_was_handed_out_and_what_was_cut(source):
    section = source(100, longest=150, epochs=1)
    with stream(section) as batches:
        everything = take(batches)
        stats = batches.stats
    assert stats["examples"] == 100 and stats["slots"] == len(everything) * 8 * T
    assert stats["tokens"] == sum((batch.segment_ids > 0).sum() for batch in everything)
    assert stats["packing_density"] == stats["tokens"] / stats["slots"]
    lengths = [len(json.loads(line)["input_ids"]) for line in Path(section.path).read_text().splitlines()]
    assert stats["truncated"] == sum(length > T for length in lengths) > 0
    assert stats["dropped"] == stats["split"] == stats["bad_rows"] == 0


def damaged(section, line, text):
    path = Path(section.path)
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines))
    return section


@pytest.mark.parametrize("text", ['{"input_ids": [1', '{"input_ids": [7]}', '{"messages": 3}'])
def test_a_bad_row_is_raised_by_next_with_file_and_line(source, text):
    section = damaged(source(50, epochs=1), 20, text)
    with stream(section, shuffle=False) as batches, pytest.raises(DataError, match=r"a\.jsonl:20: "):
        take(batches)


def test_a_bad_first_row_is_an_error_before_anything_starts(source):
    threads = threading.active_count()
    with pytest.raises(DataError, match=r"a\.jsonl:1: no columns"):
        stream(damaged(source(50), 1, '{"txt": "x"}'))
    assert threading.active_count() == threads


def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(source):
    section = damaged(damaged(source(50, epochs=1), 1, "nonsense"), 20, '{"input_ids": [7]}')
    with pytest.warns(UserWarning, match=r"a\.jsonl:(1|20): "), stream(section, on_bad_row="skip") as batches:
        assert sorted(row_numbers(take(batches))) == [n for n in range(50) if n not in (0, 19)]
        assert batches.stats["bad_rows"] == 2


def test_data_of_which_no_row_is_left_are_an_error_and_no_endless_search(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2, 3], "labels": [-100, -100, -100]}\n' * 5)
    section = SourceSection(path=str(path))
    with pytest.raises(DataError, match=r"a\.jsonl:1: no token of this row carries loss"):
        stream(section)
    with (
        pytest.warns(UserWarning, match="carries loss"),
        stream(section, on_bad_row="skip") as batches,
        pytest.raises(DataError, match="no row gives an example"),
    ):
        next(batches)
    path.write_text('{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}\n' * 5)
    with (
        stream(section, max_length=2) as batches,
        pytest.raises(DataError, match=r"of 5 rows, .*dropped 5.*max_length=2"),
    ):
        next(batches)


@pytest.mark.parametrize("epochs", [None, 1], ids=["without end", "one epoch"])
@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_a_source_of_which_every_row_is_too_long_is_an_error_beside_a_good_one(source, tmp_path, overlong, epochs):
    good = source(400, weight=5.0, epochs=epochs)
    path = tmp_path / "long.jsonl"
    rows = [{"input_ids": [1] * 80, "labels": [-100] * 70 + [1] * 10} for _ in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = SourceSection(path=str(path), epochs=epochs)
    message = r"long\.jsonl: no row gives an example.* of 50 rows, truncated 0, dropped 50.*data\.max_length=64"
    with stream([good, long], overlong=overlong) as batches, pytest.raises(DataError, match=message):
        take(batches, 100)
    alone = SourceSection(path=str(path), epochs=1)
    section = DataSection(train=[alone], max_length=T, overlong=overlong)
    with pytest.raises(DataError, match=message):
        list(eval_batches([alone], section, ENCODE, rows=4))


def test_few_good_rows_among_many_are_found_and_no_error(source):
    section = source(64)
    lines = Path(section.path).read_text().splitlines()
    bad = json.dumps({"input_ids": [1] * 80, "labels": [-100] * 79 + [1]})
    Path(section.path).write_text("\n".join([*[bad] * 63, lines[63]]))
    with stream(section, overlong="drop") as batches:
        assert set(row_numbers(take(batches, 3))) == {63}
    with (
        stream(section, overlong="drop", shuffle=False) as batches,
        pytest.raises(DataError, match=r"one virtual shard draws.*data\.shuffle=false"),
    ):
        next(batches)


def test_an_error_is_raised_again_and_after_the_batches_before_it(source):
    section = damaged(source(300, epochs=1), 290, "nonsense")
    with stream(section, rows=1, shards=[0], num_shards=1, shuffle=False) as batches:
        good = 0
        with pytest.raises(DataError):
            while True:
                next(batches)
                good += 1
        assert good > 20
        with pytest.raises(DataError):
            next(batches)


def test_threads_end_with_the_stream(source):
    before = threading.active_count()
    with stream(source(200)) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_states_that_do_not_fit_are_refused(source):
    section = source(50)
    with stream(section) as batches:
        state = batches.get_state()
    with pytest.raises(ValueError, match=r"8 virtual shards and not 4.*data\.virtual_shards"):
        stream(section, shards=range(4), num_shards=4).set_state(state)
    with pytest.raises(ValueError, match=r"1 sources and data\.train has 2"):
        stream([section, section]).set_state(state)


CHANGES = {
    "shortened": (lambda lines: lines[:40], r"a\.jsonl was changed .* 40 rows and had 50"),
    "longer": (lambda lines: [*lines, lines[0]], r"a\.jsonl was changed .* 51 rows and had 50"),
    "edited": (lambda lines: [*lines[:30], lines[30].replace("0", "1", 1), *lines[31:]], r"other content of the same"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_changed_before_the_run_goes_on_is_an_error_that_names_it(source, change):
    section, (edit, message) = source(50), CHANGES[change]
    with stream(section) as batches:
        take(batches, 3)
        state = json.loads(json.dumps(batches.get_state()))
    path = Path(section.path)
    path.write_text("".join(line + "\n" for line in edit(path.read_text().splitlines())))
    with stream(section) as batches, pytest.raises(DataError, match=message):
        batches.set_state(state)


def test_a_file_may_be_elsewhere_when_the_run_goes_on_but_not_gone(source, tmp_path):
    section = [source(50), source(30, name="b.jsonl")]
    with stream(section) as batches:
        expected = take(batches, 6)
    with stream(section) as batches:
        take(batches, 3)
        state = batches.get_state()
    Path(section[0].path).rename(tmp_path / "moved.jsonl")
    moved = [SourceSection(path=str(tmp_path / "moved.jsonl")), section[1]]
    with stream(moved) as batches:
        batches.set_state(state)
        assert same(take(batches, 3), expected[3:])
    folder = SourceSection(path=str(tmp_path))
    with stream(folder) as batches:
        whole = batches.get_state()
    Path(section[1].path).unlink()
    with stream(folder) as batches, pytest.raises(DataError, match=r"has 1 files and had 2 .*b\.jsonl is gone"):
        batches.set_state(whole)


def test_looking_ahead_hands_out_nothing_and_padding_counts_nowhere(source):
    section = source(60, epochs=1)
    with stream(section) as batches:
        expected = take(batches)
    with stream(section) as batches:
        assert batches.has_next()
        start = batches.get_state()
        assert batches.has_next() and batches.get_state() == start
        seen = []
        while batches.has_next():
            seen.append(next(batches))
        assert same(seen, expected)
        stats = batches.stats
        padding = batches.padding()
        assert padding.tokens.shape == expected[0].tokens.shape and not padding.segment_ids.any()
        assert batches.stats == stats and not batches.has_next()
        with pytest.raises(StopIteration):
            next(batches)


def test_numbers_that_do_not_divide_name_their_keys(source):
    assert [count_shards(DataSection(train=[]), rows) for rows in (32, 12, 6, 7)] == [8, 4, 2, 1]
    with pytest.raises(ValueError, match=r"train\.batch_size=8 .*data\.virtual_shards=3"):
        count_shards(DataSection(train=[], virtual_shards=3), 8)
    with pytest.raises(ValueError, match=r"train\.batch_size=7"):
        stream(source(5), rows=7)


@pytest.mark.parametrize("rows", [1, 5, 120])
def test_evaluation_sees_every_example_once_in_the_same_batches_every_time(source, rows):
    sections = [source(rows), source(10, name="b.jsonl", weight=0.1)]
    data = DataSection(train=sections, max_length=T)
    whole = list(eval_batches(sections, data, ENCODE, rows=4))
    assert sorted(row_numbers(whole)) == sorted([*range(rows), *range(10)])
    assert all(batch.tokens.shape == (4, T) for batch in whole)
    assert same(list(eval_batches(sections, data, ENCODE, rows=4)), whole)
