"""What `Rows` promises, held by the reader of every kind of file."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain.data.files.find import KINDS, open_rows

ROWS = [{"text": f"row {number}"} for number in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)


def write(path, kind):
    if kind == ".parquet":
        pq.write_table(TABLE, path, row_group_size=7)
    elif kind in (".arrow", ".feather"):
        with pa.ipc.new_file(str(path), TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=7)
    elif kind == ".array_record":
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for line in LINES.splitlines():
            writer.write(line)
        writer.close()
    else:
        content = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in ROWS) if ".csv" in kind else LINES
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(content))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 8])
def test_every_reader_gives_rows_places_and_blocks(tmp_path, kind, limit):
    path = tmp_path / f"a{kind}"
    write(path, kind)
    rows = open_rows(str(path), limit, 1)
    count = limit or len(ROWS)
    assert len(rows) == count and [rows[index] for index in range(count)] == ROWS[:count]
    assert rows[count - 1] == ROWS[count - 1] and rows[0] == ROWS[0]
    ends = rows.block_ends
    assert ends[-1] == count and ends[0] > 0 and (np.diff(ends) > 0).all() and np.issubdtype(ends.dtype, np.integer)
    places = [rows.place(index) for index in range(count)]
    assert len(set(places)) == count and all(place.startswith(f"{path}:") for place in places)
    assert rows.block_bytes >= 0
    assert dict(rows.types) in ({}, {"text": pa.string()})
