"""What is computed for the rows of sources, whatever they are packed with, and once."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from jaxtrain.config import MeshSection, parse_config
from jaxtrain.data.sources import DataError, Source
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.session.source_cache import CacheItem, cached_rows, score_packed, source_items
from jaxtrain.types import Example


def session_of(source, **data):
    tree = {"recipe": "sft", "run": {"dir": "unused"}, "model": {"path": "unused"}}
    tree |= {"data": {"train": source, **data}, "train": {"steps": 1, "batch_size": 8}}
    config = parse_config(tree, "test")
    return SimpleNamespace(config=config, check=lambda: None)


@pytest.fixture
def session(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(1, 30)))
    return session_of({"path": str(tmp_path / "rows.jsonl")})


def test_every_example_gets_its_own_part(session):
    rng = np.random.default_rng(0)

    def example(value):
        length = int(rng.integers(1, 9))
        return Example(np.full(length, value, np.int32), np.ones(length, np.float32))

    items = [CacheItem(n, ("left", "right"), (example(2 * n), example(2 * n + 1))) for n in range(30)]
    role = SimpleNamespace(mesh=make_mesh(MeshSection()))
    found = list(score_packed(session, role, iter(items), 24, lambda batch: {"twice": 2 * batch.tokens}))
    assert sorted(item.row for item, _ in found) == list(range(30))
    for item, scores in found:
        for example, score in zip(item.examples, scores, strict=True):
            np.testing.assert_array_equal(score["twice"], 2 * example.input_ids)


def test_a_source_is_computed_once_and_a_file_of_something_else_is_refused(session, tmp_path):
    calls = []

    def compute(source):
        calls.append(len(source))
        return {"lengths": pa.array([[len(source[number]["text"])] for number in range(len(source))])}

    def rows(model):
        return cached_rows(session, str(tmp_path / "cache"), "teacher.cache", {"model": model}, compute)

    for _ in range(2):
        (found,) = rows("one").values()
        assert [found[number]["lengths"] for number in range(29)] == [[n] for n in range(1, 30)]
    assert calls == [29]
    with pytest.raises(ValueError, match=r"0\.parquet: .* of another model: .* choose another teacher\.cache"):
        rows("other")


def stream():
    yield {"text": "one"}


def test_a_stream_has_no_cache(tmp_path):
    session = session_of({"source": stream})
    with pytest.raises(ValueError, match=r"reference\.cache: .* is a stream"):
        cached_rows(session, str(tmp_path), "reference.cache", {}, lambda source: {})


def test_a_bad_row_is_an_error_or_left_out(session):
    def make(number, row):
        if number == 3:
            raise ValueError("bad")
        return [CacheItem(number, (), ())]

    source = Source(session.config.data.train_sources[0])
    with pytest.raises(DataError, match=r"rows\.jsonl:4: bad"):
        list(source_items(session, source, make))
    skipping = session_of({"path": session.config.data.train.path}, on_bad_row="skip")
    assert [item.row for item in source_items(skipping, source, make)] == [n for n in range(29) if n != 3]
