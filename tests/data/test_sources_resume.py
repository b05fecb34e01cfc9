"""Every kind of source gives the same batches after a resume, on any number of hosts, and notices that it changed."""

import gzip
import json
from pathlib import Path

import fsspec
import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data.files import columnar, compressed
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.sources import DataError
from jaxtrain.types import Example

COUNT = 150
LENGTHS = np.random.default_rng(0).integers(2, 20, COUNT).tolist()
ROWS = [{"first": index, "n": length} for index, length in enumerate(LENGTHS)]
ROWS_BY_LINE = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHANGES = {"first": 0}  # what the functions below give of the first row


def encode(row):
    first, length = int(row["first"]), int(row["n"])  # CSV is text
    ids = np.arange(length, dtype=np.int32) + 100 * first
    return Example(ids, np.ones(len(ids), np.float32))


def given():
    return [{"first": CHANGES["first"], "n": LENGTHS[0]}, *ROWS[1:]]


def as_map_dataset():
    return grain.MapDataset.source(given())


def as_iter_dataset():
    return as_map_dataset().to_iter_dataset()


def as_generator():
    yield from given()


def write(folder: Path, kind: str, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=60)
    elif kind == "arrow":
        with pa.ipc.new_stream(str(path), pa.Table.from_pylist(rows).schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows), max_chunksize=40)
    elif kind == "csv":
        path.write_text("first,n\n" + "".join(f"{row['first']},{row['n']}\n" for row in rows))
    elif kind == "array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pack = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(kind, bytes)
        path.write_bytes(pack(lines))
    return str(path)


FILES = ["jsonl", "json", "csv", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "array_record"]
FUNCTIONS = {each.__name__: each for each in (given, as_map_dataset, as_iter_dataset, as_generator)}
KINDS = [*FILES, "memory://parquet", "memory://jsonl", *FUNCTIONS]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(columnar, "_PIECE_ROWS", 17)
    monkeypatch.setattr(compressed, "_SPACING", 100)
    monkeypatch.setitem(CHANGES, "first", 0)


@pytest.fixture
def section(tmp_path):
    def make(kind, rows=ROWS, **more):
        if kind in FUNCTIONS:
            return SourceSection.model_validate({"source": FUNCTIONS[kind]} | more)
        path = write(tmp_path, kind.removeprefix("memory://"), rows)
        if kind.startswith("memory://"):
            fsspec.filesystem("memory").pipe(f"/resume/{Path(path).name}", Path(path).read_bytes())
            path = f"memory://resume/{Path(path).name}"
        return SourceSection.model_validate({"path": path} | more)

    return make


def stream(section, shards=range(4), shuffle=True):
    data = DataSection(train=section, max_length=32, packing_bins=3, shuffle=shuffle)
    return TrainStream([section], data, encode, rows=4, seed=0, shards=shards, num_shards=4)


def take(batches, count):
    with batches:
        return [batch.tokens for _, batch in zip(range(count), batches, strict=False)]


def repeats(kind):
    return {} if kind in ("as_iter_dataset", "as_generator") else {"epochs": 2}


@pytest.mark.parametrize("shuffle", [True, False, "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_anywhere_and_on_any_number_of_hosts_gives_the_same_batches(section, kind, shuffle):
    source = section(kind, **repeats(kind))
    whole = take(stream(source, shuffle=shuffle), 10_000)
    drawn = np.concatenate([batch.ravel() for batch in whole])
    firsts = {int(row["first"]) for row in ROWS}
    assert set(np.unique(drawn[drawn > 0] // 100).tolist()) <= firsts
    assert np.count_nonzero(np.isin(drawn, [100 * first for first in range(1, COUNT)])) == (
        (COUNT - 1) * (2 if repeats(kind) else 1)
    )
    for stop in (1, len(whole) // 2, len(whole) - 1):
        with stream(source, shuffle=shuffle) as one:
            before = [next(one).tokens for _ in range(stop)]
            state = json.loads(json.dumps(one.get_state()))
            following = next(one).tokens  # which is not in the state
        with stream(source, shuffle=shuffle) as other:
            other.set_state(state)
            after = [batch.tokens for batch in other]
        assert np.array_equal(following, after[0])
        np.testing.assert_array_equal(np.array(before + after), np.array(whole))
        halves = [stream(source, range(first, first + 2), shuffle) for first in (0, 2)]
        for host in halves:
            host.set_state(state)
        rows = [[batch.tokens for batch in host] for host in halves]
        length = max(map(len, rows))
        padded = [[*each, *[halves[0].padding().tokens] * (length - len(each))] for each in rows]
        joined = [np.concatenate(pair) for pair in zip(*padded, strict=True)]
        np.testing.assert_array_equal(np.array(joined), np.array(whole[stop:]))
        for host in halves:
            host.close()


@pytest.mark.parametrize("kind", ["memory://jsonl.gz", "memory://parquet"])
def test_a_resume_after_any_batch_of_two_epochs_of_a_remote_file(section, kind):
    """In the middle of the file, and where each shard comes to the end of an epoch."""
    source = section(kind, epochs=2)
    whole = take(stream(source), 10_000)
    epochs = set()
    with stream(source) as one, stream(source) as other:
        for stop in range(1, len(whole)):
            next(one)
            state = json.loads(json.dumps(one.get_state()))
            epochs |= {shard["next"]["counts"][0] * 4 // COUNT for shard in state.values()}
            other.set_state(state)
            np.testing.assert_array_equal(next(other).tokens, whole[stop])
    assert epochs >= {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_changed_is_an_error(section, kind):
    with stream(section(kind)) as before:
        next(before)
        state = before.get_state()
    CHANGES["first"] = 9  # of the functions
    after = stream(section(kind, rows=[ROWS[0] | {"first": 9}, *ROWS[1:]]))
    with pytest.raises(DataError, match="was changed since the checkpoint was saved"):
        after.set_state(state)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_the_shuffled_order_is_the_same_for_every_format(section, kind):
    expected = take(stream(section("given")), 20)
    np.testing.assert_array_equal(take(stream(section(kind)), 20), expected)


def test_blocks_are_read_once_an_epoch(section, monkeypatch):
    """With `shuffle: blocks`, neighbours come from few pieces, so that a small cache does not read any twice."""
    source = section("parquet", rows=[{"first": index, "n": 2} for index in range(2000)], epochs=1)
    monkeypatch.setattr("jaxtrain.data.mixing._WINDOW", 3)
    monkeypatch.setattr(columnar, "CACHE", columnar.CACHE.__class__(20_000))
    loads = []
    load = columnar.ColumnarRows._load
    monkeypatch.setattr(columnar.ColumnarRows, "_load", lambda rows, piece: loads.append(piece) or load(rows, piece))
    drawn = np.concatenate(take(stream(source, shuffle="blocks"), 10_000)).ravel()
    drawn = drawn[(drawn > 0) & (drawn % 100 == 0)] // 100
    assert sorted(drawn.tolist()) == list(range(1, 2000))
    assert len(loads) <= 1.2 * len(set(loads)) + 8
    assert np.mean(np.abs(np.diff(drawn))) > 200  # pieces of all of the file, in turn


def as_rows_too_long():
    yield from ({"first": 1, "n": 50} for _ in range(70))


def test_a_stream_without_any_example_is_an_error_with_its_counts():
    section = SourceSection.model_validate({"source": as_rows_too_long})
    data = DataSection(train=section, max_length=32, overlong="drop")
    batches = TrainStream([section], data, encode, rows=4, seed=0, shards=range(4), num_shards=4)
    with pytest.raises(DataError, match="no row gives an example to train on: of 70 rows, truncated 0, dropped 70"):
        next(batches)
    batches.close()
