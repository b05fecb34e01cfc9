import gzip
import itertools
import json
import logging

import numpy as np
import pytest
import zstandard

from jaxtrain.config import SourceSection
from jaxtrain.data.files import compressed, text
from jaxtrain.data.sources import DataError, Source

ROWS = [{"text": " ".join(str(number * word) for word in range(40))} for number in range(3000)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


def packed(kind, members):
    parts = np.array_split(np.arange(len(LINES)), members)
    contents = [b"".join(LINES[index] for index in part) for part in parts]
    if kind == "gz":
        return b"".join(map(gzip.compress, contents)) + b"\0" * 5
    skippable = (0x184D2A51).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    return b"".join(skippable + zstandard.compress(content) for content in contents)


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("members", [1, 3, 50])
def test_rows_are_read_in_any_order(tmp_path, monkeypatch, caplog, kind, members):
    for name, size in {"_SPACING": 1 << 12, "_LONG_FRAME": 1 << 15, "_OUTPUT": 1 << 11, "_FED": 1 << 8}.items():
        monkeypatch.setattr(compressed, name, size)
    monkeypatch.setattr(compressed, "_POINTS", 40)
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed(kind, members))
    with caplog.at_level(logging.INFO, logger="jaxtrain"):
        source = Source(SourceSection(path=str(path)))
    order = np.random.default_rng(0).permutation(len(ROWS)).tolist()
    assert [source[index] for index in order] == [ROWS[index] for index in order]
    assert source.place(2500).endswith(":2501")
    blob = source._files[0]._blob
    if kind == "gz":
        assert 10 < len(blob._points) <= 40
    assert ("temporary file" in caplog.text) == (kind == "zst" and members < 50)  # long frames are respooled


def test_short_and_long_frames_may_be_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_LONG_FRAME", 1 << 15)
    monkeypatch.setattr(compressed, "_SPACING", 1 << 10)
    ends = [0, 3, 4, 500, 510, 511, 2000, 2004, 3000]
    path = tmp_path / "a.jsonl.zst"
    frames = [b"".join(LINES[a:b]) for a, b in itertools.pairwise(ends)]
    path.write_bytes(b"".join(map(zstandard.compress, frames)))
    source = Source(SourceSection(path=str(path)))
    assert [source[index] for index in reversed(range(len(ROWS)))] == ROWS[::-1]


def test_a_limit_reads_only_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_OUTPUT", 1 << 11)
    monkeypatch.setattr(text, "_HEAD_BYTES", 1 << 11)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(packed("gz", 1))
    source = Source(SourceSection(path=str(path), limit=5))
    assert [source[index] for index in (4, 0)] == [ROWS[4], ROWS[0]]
    assert source._files[0]._blob._passed < sum(map(len, LINES)) / 10


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_trailing_rubbish_is_an_error(tmp_path, kind):
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed(kind, 2) + b"rubbish, and more of it")
    with pytest.raises(DataError, match=rf"a\.jsonl\.{kind}: broken"):
        Source(SourceSection(path=str(path)))
