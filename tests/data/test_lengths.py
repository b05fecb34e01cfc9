"""The count of a finite stream is what the stream then does. The lengths it needs are cached while nothing changes."""

import json
import logging
import os

import numpy as np
import pytest

from jaxtrain.config import DataSection, SourceSection
from jaxtrain.data import lengths
from jaxtrain.data.formats import Encoder
from jaxtrain.data.pipeline import TrainStream
from jaxtrain.data.shards import COUNTERS
from jaxtrain.data.sources import DataError

T = 64
ENCODE = Encoder(None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxtrain" / "lengths"


@pytest.fixture
def source(tmp_path):
    def make(rows, longest=100, name="a.jsonl", seed=0, **section):
        rng = np.random.default_rng([rows, seed])
        lines = []
        for row in range(rows):
            ids = [0, row, *rng.integers(1000, 2000, rng.integers(1, longest)).tolist()]
            # Of some rows only a late token is trained, which a cut leaves out.
            labels = [-100] * (len(ids) - 1) + ids[-1:] if row % 5 == 0 else ids
            lines.append(json.dumps({"input_ids": ids, "labels": labels}))
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return SourceSection(path=str(path), **section)

    return make


def stream(sources, *, rows=8, shards=8, epochs=None, encode=ENCODE, **data):
    sources = sources if isinstance(sources, list) else [sources]
    section = DataSection(train=sources, **{"max_length": T, "packing_bins": 4} | data)
    made = TrainStream(sources, section, encode, rows=rows, seed=3, shards=range(shards), num_shards=shards)
    if epochs is not None:
        made.end_after(epochs)
    return made


VARIANTS = [
    {},
    {"packing": False},
    {"packing_bins": 1},
    {"overlong": "split"},
    {"overlong": "drop"},
    {"shuffle": False},
    {"rows": 16},
    {"shards": 2},
    {"shards": 1, "rows": 3},
]


@pytest.mark.parametrize("epochs", [0.3, 1, 2, 2.5])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("mixture", [False, True], ids=["one", "mixture"])
def test_the_count_is_what_the_stream_then_does(source, variant, epochs, mixture):
    sources = [source(90)] + ([source(31, name="b.jsonl", weight=0.4), source(1, name="c.jsonl")] if mixture else [])
    with stream(sources, epochs=epochs, **variant) as batches:
        count = batches.count(batches.lengths(None))
        steps = sum(1 for _ in batches)
        stats = batches.stats
        assert (count.steps, count.slots) == (steps, stats["slots"])
        names = ("rows", "examples", "tokens", *COUNTERS)
        assert {name: count.totals[name] for name in names} == {name: stats[name] for name in names}
        assert stats["rows"] / batches.epoch_rows == pytest.approx(epochs, abs=3 / batches.epoch_rows)


def test_bad_rows_that_are_skipped_are_counted(source, tmp_path):
    section = source(40)
    with open(section.path, "a") as file:
        file.write('{"input_ids": []}\nnonsense\n')
    with pytest.warns(UserWarning, match="skipped a bad row"), stream(section, epochs=1, on_bad_row="skip") as batches:
        count = batches.count(batches.lengths(None))
        assert count.totals["bad_rows"] == 2
        assert count.steps == sum(1 for _ in batches)
        batches.lengths(ENCODE.fingerprint)
    # What was cached with bad rows is no excuse for one.
    with stream(section, epochs=1) as batches, pytest.raises(DataError, match=r"a.jsonl:41"):
        batches.lengths(ENCODE.fingerprint)


def test_a_source_without_an_example_is_an_error_before_the_first_step(source, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"input_ids": [5] * 100}) + "\n")
    section = SourceSection(path=str(tmp_path / "long.jsonl"))
    with (
        stream([source(30), section], epochs=1, overlong="drop") as batches,
        pytest.raises(
            DataError, match=r"long.jsonl: no row gives an example to train on: of 1 rows, truncated 0, drop"
        ),
    ):
        batches.count(batches.lengths(None))


def test_an_epoch_of_a_mixture_passes_over_every_source_and_keeps_the_shares(source):
    sources = [source(40, weight=1), source(60, name="b.jsonl", weight=3)]
    with stream(sources, epochs=1) as batches:
        assert batches.epoch_rows == 160  # 40 of the first, which are a quarter, and 120 of the second
        assert batches.count(batches.lengths(None)).totals["rows"] == 160


class Counting(Encoder):
    """An encoder that counts its calls."""

    calls = 0

    def __call__(self, row):
        type(self).calls += 1
        return super().__call__(row)


def read_again(section, encode=None, **options):
    """How many rows a count reads, beside the first of a source."""
    encode = encode or Counting(None)
    with stream(section, epochs=1, encode=encode, **options) as batches:
        Counting.calls = 0
        batches.lengths(encode.fingerprint)
    return Counting.calls


def test_lengths_are_cached_where_nothing_changed(source, cache):
    section = source(50)
    assert read_again(section) == 50
    assert read_again(section) == 0
    assert len(list(cache.iterdir())) == 1
    # None of these changes the length of a row.
    other = section.model_copy(update={"weight": 2.0})
    assert read_again(other, packing=False, packing_bins=2, shuffle=False, rows=16, shards=2, workers=1) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": T - 1},
        {"overlong": "split"},
        {"loss_on": "all"},
        {"vocab_size": 3000},
        {"limit": 20},
        {"rewrite": True},
        {"touch": True},
        {"code": True},
    ],
    ids=str,
)
def test_a_stale_cache_is_never_used(source, change, monkeypatch, tmp_path):
    section = source(50)
    read_again(section)
    change = dict(change)
    if encoding := {key: change.pop(key) for key in ("loss_on", "vocab_size") if key in change}:
        change["encode"] = Counting(None, **encoding)
    if change.pop("rewrite", False):
        source(50, seed=1)
    if change.pop("touch", False):  # a large file is hashed in part only: its time counts as well
        os.utime(section.path, ns=(1, 1))
    if change.pop("code", False):
        (tmp_path / "other.py").write_text("# other code")
        monkeypatch.setattr(lengths, "__file__", str(tmp_path / "lengths.py"))
    if limit := change.pop("limit", None):
        section = section.model_copy(update={"limit": limit})
    assert read_again(section, **change) == (limit or 50)


def rows_of(count):
    return [{"input_ids": [1] * (3 + number % 5)} for number in range(count)]


def test_lengths_of_a_function_of_ones_own_are_not_cached(cache):
    """Its code may change without a change of its first rows, its last and their number."""
    section = SourceSection(source=f"{__name__}:rows_of", args={"count": 50})
    assert read_again(section) == read_again(section) == 50
    assert not cache.exists() or not list(cache.iterdir())


def test_another_tokenizer_has_another_fingerprint(tmp_path):
    from converters.tokenizer import CHATML, load_tokenizer, write_byte_tokenizer

    write_byte_tokenizer(tmp_path)
    tokenizer, other = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    assert Encoder(tokenizer).fingerprint == Encoder(other).fingerprint
    used = Encoder(tokenizer)
    used({"prompt": "a", "completion": "b"})  # makes what it needs to encode, which is no setting
    assert used.fingerprint == Encoder(other).fingerprint
    other.chat_template = CHATML + " "
    assert Encoder(tokenizer).fingerprint != Encoder(other).fingerprint
    assert Encoder(tokenizer).fingerprint != Encoder(tokenizer, prompt_format="plain").fingerprint


def test_a_damaged_cache_or_one_that_cannot_be_written_costs_a_pass(source, cache, caplog, monkeypatch, tmp_path):
    section = source(50)
    read_again(section)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert read_again(section) == 50 and read_again(section) == 0
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    caplog.set_level(logging.INFO)
    assert read_again(section) == 50
    assert "cannot be written" in caplog.text
