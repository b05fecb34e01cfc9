"""Rows that a function gives: sequences, grain data sets and iterables, in the order of a stream and after a resume."""

import itertools
import sys

import grain
import numpy as np
import pytest

from jaxtrain.config import ConfigError, DataSection, SourceSection, config_tree, parse_config
from jaxtrain.config.changes import differences
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.sources import DataError, Source, StreamEndError, read_rows
from jaxtrain.types import Example

COUNT = 200
iterations = []


def rows(count=COUNT):
    return [{"text": f"row {number}", "ids": np.arange(number % 4)} for number in range(count)]


def map_dataset(count=COUNT):
    return grain.MapDataset.source(rows(count)).map(lambda row: row | {"text": row["text"] + "!"})


def iter_dataset(count=COUNT):
    return map_dataset(count).to_iter_dataset()


def generator(count=COUNT):
    iterations.append(count)
    yield from rows(count)


def endless_dataset():
    return grain.MapDataset.source(rows()).repeat()


def gaps():
    return grain.MapDataset.source(rows()).filter(lambda row: row["text"] != "row 1")


def number():
    return 5


def odd_rows():
    return [*rows(2), "no mapping"]


def mapping():
    return {"text": "x"}


def objects():
    return [{"text": object()}]


def opened(function, **section):
    return Source(SourceSection.model_validate({"source": function} | section))


@pytest.mark.parametrize(("function", "mark"), [(rows, ""), (map_dataset, "!")])
def test_sequences_and_map_datasets_are_read_in_any_order(function, mark):
    source = opened(function)
    assert len(source) == COUNT and source.stream is None
    for index in (199, 0, 5):
        assert source[index] == {"text": f"row {index}{mark}", "ids": list(range(index % 4))}
    assert len(opened(function, args={"count": 7})) == 7 and len(opened(function, limit=9)) == 9


@pytest.mark.parametrize(("function", "mark"), [(generator, ""), (iter_dataset, "!")])
@pytest.mark.parametrize("limit", [None, 50, 1000])
def test_iterables_are_read_once_in_their_order(function, mark, limit):
    section = {"source": function, "limit": limit}
    expected = [f"row {index}{mark}" for index in range(min(COUNT, limit or COUNT))]
    assert [row["text"] for row in read_rows(SourceSection.model_validate(section))] == expected
    source = Source(SourceSection.model_validate(section))
    assert len(source) == sys.maxsize
    with pytest.raises(StreamEndError):
        source[1000]
    assert len(source) == len(expected)


def test_a_stream_holds_what_shards_will_read_and_nothing_else():
    iterations.clear()
    source = opened(generator)
    stream = source.stream
    stream.expect({1: 101, 2: 42}, 4, again=[8])  # this host has the shards 1 and 2 of four
    assert source[8]["text"] == "row 8" and not stream._held
    assert source[105]["text"] == "row 105"
    assert set(stream._held) == {101, *range(42, 106, 4)}
    assert [source[index]["text"] for index in (101, 42, 46)] == ["row 101", "row 42", "row 46"]
    assert len(iterations) == 1
    assert source[42]["text"] == "row 42" and len(iterations) == 2  # from the beginning, as often as asked


@pytest.mark.parametrize(
    ("function", "section", "message"),
    [
        (endless_dataset, {}, "the data set is endless: leave `repeat` out"),
        (number, {}, "returned int: it must be a sequence"),
        (mapping, {}, "returned dict, and not rows"),
        (generator, {"args": {"count": 0}}, "holds no rows"),
        (generator, {"args": {"rows": 1}}, r"generator cannot be called with the `args` \{'rows': 1\}: .*'rows'"),
        (generator, {"epochs": 2}, "a stream is read once; for epochs=2"),
        (objects, {}, "row 1 cannot be written as JSON: a value of type object"),
        (odd_rows, {}, "^source:.*:row 3 must be a dict, not str"),
        (gaps, {}, "row 2 must be a dict, not NoneType; a grain data set with `filter` has gaps"),
    ],
)
def test_what_is_no_data_set_is_named(function, section, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(SourceSection.model_validate({"source": function} | section)))


def tree(**section):
    return {"recipe": "sft", "model": {"path": "model"}, "data": {"train": section}}


def test_a_function_is_named_by_its_file():
    source = Source(SourceSection.model_validate({"source": f"{__file__}:rows", "args": {"count": 3}}))
    assert [source[index]["text"] for index in range(len(source))] == ["row 0", "row 1", "row 2"]


def test_a_function_is_recorded_by_its_import_path():
    given = parse_config(tree(source=rows, args={"count": 3}))
    recorded = config_tree(given)["data"]["train"]
    assert recorded["source"] == f"{rows.__module__}:rows" and recorded["path"] == f"source:{rows.__module__}:rows"
    saved = parse_config(config_tree(given))
    assert differences(saved, given) == []
    other = parse_config(tree(source=rows, args={"count": 4}))
    assert [change.key for change in differences(saved, other)] == ["data.train.args.count"]
    other = parse_config(tree(source=generator, args={"count": 3}))
    assert {change.key for change in differences(saved, other)} == {"data.train.source", "data.train.path"}


def test_sources_exclude_each_other():
    for section in ({"source": rows, "path": "a.jsonl"}, {"source": rows, "rows": [{"a": 1}]}):
        with pytest.raises(ConfigError, match="give only one of"):
            parse_config(tree(**section))
    with pytest.raises(ConfigError, match="`args` are for a function"):
        parse_config(tree(path="a.jsonl", args={"count": 3}))


def three_tokens(row):
    return Example(np.ones(3, np.int32), np.ones(3, np.float32))


def odd_stream():
    yield from [{"text": "a"}, "no mapping", {"text": "b"}]


@pytest.mark.parametrize("function", [odd_rows, odd_stream])
def test_rows_that_are_no_mappings_are_named_or_skipped(function):
    section = SourceSection.model_validate({"source": function})
    shared = {"rows": 1, "seed": 0, "shards": [0], "num_shards": 1}
    for on_bad_row in ("error", "skip"):
        data = DataSection(train=section, max_length=16, on_bad_row=on_bad_row, packing=False, shuffle=False)
        with TrainStream([section.model_copy(update={"epochs": 1})], data, three_tokens, **shared) as stream:
            if on_bad_row == "error":
                with pytest.raises(DataError, match=r":row \d must be a dict, not str"):
                    list(itertools.islice(stream, 4))
                continue
            with pytest.warns(UserWarning, match=r"skipped a bad row.*:row \d must be a dict"):
                made = list(stream)
            assert len(made) == 2 and stream.stats["bad_rows"] == 1 and stream.stats["rows"] == 3


@pytest.mark.parametrize("shards", [1, 4])
def test_the_epoch_of_a_stream_counts_its_rows(shards):
    section = SourceSection.model_validate({"source": generator, "args": {"count": 10}})
    data = DataSection(train=section, max_length=16, packing=False)
    shared = {"rows": shards, "seed": 0, "shards": range(shards), "num_shards": shards}
    with TrainStream([section], data, three_tokens, **shared) as stream:
        assert stream.epoch_rows == np.inf
        for _ in stream:
            state = stream.get_state()
        assert stream.epoch_rows == stream.stats["rows"] == 10
    with TrainStream([section], data, three_tokens, **shared) as resumed:
        resumed.set_state(state)
        assert not list(resumed) and resumed.stats["rows"] == resumed.epoch_rows == 10
