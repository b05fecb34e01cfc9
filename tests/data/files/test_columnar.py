import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.config import SourceSection
from jaxtrain.data.files import blobs, columnar, read_cache
from jaxtrain.data.sources import DataError, Source

ROWS = [
    {"messages": [{"role": "user", "content": f"{number} " * (number % 30)}], "n": number if number % 3 else None}
    for number in range(500)
]
TABLE = pa.Table.from_pylist(ROWS)


def write(path, group=100):
    if path.suffix == ".parquet":
        pq.write_table(TABLE, path, row_group_size=group)
        return path
    stream = path.stem.startswith("stream")
    options = pa.ipc.IpcWriteOptions(compression="zstd" if "zstd" in path.stem else None)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=group)
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "file.arrow", "stream.arrow", "file-zstd.arrow", "stream-zstd.arrow", "a.feather"]
)
@pytest.mark.parametrize("limit", [None, 1, 100, 250, 900])
def test_rows_are_read_in_any_order(tmp_path, monkeypatch, name, limit):
    monkeypatch.setattr(columnar, "_PIECE_ROWS", 33)
    source = Source(SourceSection(path=str(write(tmp_path / name)), limit=limit))
    assert len(source) == len(ROWS[:limit])
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    assert [source[index] for index in order] == [ROWS[index] for index in order]
    assert source.block_ends()[-1] == len(source) and (np.diff(source.block_ends()) > 0).all()


def test_huge_row_groups_are_decoded_in_pieces_and_the_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_PIECE_ROWS", 10)
    small = read_cache.Cache(20_000)
    monkeypatch.setattr(columnar, "CACHE", small)
    source = Source(SourceSection(path=str(write(tmp_path / "a.parquet", group=500))))
    decoded = []
    decode = columnar.ParquetRows._decode
    monkeypatch.setattr(
        columnar.ParquetRows, "_decode", lambda rows, piece: decoded.append(piece) or decode(rows, piece)
    )
    assert [source[index] for index in range(500)] == ROWS
    assert decoded == list(range(50)) and small._bytes <= 20_000 and len(small._held) < 30
    assert source[5] == ROWS[5] and decoded[-1] == 0


def test_texts_of_a_dictionary_count_as_often_as_they_occur(tmp_path, monkeypatch):
    """The file holds a repeated text once; a decoded row holds all of it."""
    monkeypatch.setattr(columnar, "_PIECE_BYTES", 1 << 20)
    prompt = [{"role": "system", "content": "x" * 20_000}]
    table = pa.table({"messages": [prompt] * 1000, "system": ["y" * 20_000] * 1000, "n": list(range(1000))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    source = Source(SourceSection(path=str(tmp_path)))
    assert source.block_bytes > 40_000 * 1000
    rows = np.diff(source.block_ends(), prepend=0)
    assert rows.sum() == 1000 and 10 < rows.max() < 30
    (opened,) = source._files
    assert max(opened._load(piece)[1] for piece in range(3)) < 1.1 * (1 << 20)
    assert [source[n]["n"] for n in (999, 0, 500)] == [999, 0, 500]


def test_pieces_passed_on_the_way_are_held_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_PIECE_ROWS", 10)
    source = Source(SourceSection(path=str(write(tmp_path / "a.parquet", group=500))))
    assert source[499] == ROWS[499]
    monkeypatch.setattr(columnar.ParquetRows, "_decode", None)
    assert [source[index] for index in range(500)] == ROWS


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "a.parquet"])
def test_a_broken_file_is_named(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"{name}: broken"):
        source = Source(SourceSection(path=str(path)))
        [source[index] for index in range(len(source))]


def test_dictionaries_in_an_arrow_stream_are_refused(tmp_path):
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="dictionary messages in an Arrow stream are not supported"):
        Source(SourceSection(path=str(tmp_path / "a.arrow")))
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert Source(SourceSection(path=str(tmp_path / "a.arrow")))[1] == {"text": "b"}


def test_pieces_that_are_read_together_are_decoded_in_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_PIECE_ROWS", 10)
    monkeypatch.setattr(columnar, "CACHE", read_cache.Cache(30_000))
    write(tmp_path / "a.parquet", group=100)
    write(tmp_path / "b.parquet", group=500)
    source = Source(SourceSection(path=str(tmp_path)))
    opened = []
    monkeypatch.setattr(columnar, "arrow_file", lambda blob: opened.append(blob.name) or blobs.arrow_file(blob))
    source.read_together([np.array([49, 3, 95, 60, 52])])  # pieces 10, 45 and 2 of the second file among them
    assert [source[500 + 10 * piece + 3] for piece in (45, 2, 10)] == [ROWS[10 * piece + 3] for piece in (45, 2, 10)]
    assert [source[10 * piece] for piece in (49, 3)] == [ROWS[490], ROWS[30]]
    assert [name[-9:] for name in opened] == ["b.parquet", "a.parquet", "a.parquet"]  # two row groups of the first file


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_column_that_is_there_twice_is_named(tmp_path, name):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=f"{name}: there are several columns 'text'"):
        Source(SourceSection(path=str(tmp_path / name)))


def test_columns_of_bytes_are_named_where_text_is_read(tmp_path):
    table = pa.table({"q": pa.array([b"a"]), "a": ["b"], "image": pa.array([b"c"])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'prompt' holds bytes \(binary\).*cast"):
        Source(SourceSection(path=str(tmp_path / "a.parquet"), columns={"prompt": "q", "completion": "a"}))
    assert len(Source(SourceSection(path=str(tmp_path / "a.parquet"), columns={"text": "a"}))) == 1
