import json
import pickle

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain.data.files.blobs import LocalBlob
from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.find import open_blob
from jaxtrain.data.files.records import ArrayRecordRows


def rows_of(path, records, limit=None):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return ArrayRecordRows(LocalBlob(str(path)), limit)


@pytest.mark.parametrize(("limit", "count"), [(None, 5), (3, 3), (9, 5)])
def test_records_are_rows_up_to_the_limit(tmp_path, limit, count):
    rows = rows_of(tmp_path / "a.array_record", [json.dumps({"n": n}).encode() for n in range(5)], limit)
    assert [rows[index] for index in range(len(rows))] == [{"n": n} for n in range(count)]
    assert rows.place(1).endswith("a.array_record:record 2")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (pickle.dumps({"n": 1}), "the record is a pickle: records must be JSON objects.*data.train.source"),
        (b"\x0a\x03abc", r"the record is no JSON \("),
        (b"[1]", "a row must be a JSON object, not list"),
    ],
)
def test_a_record_that_is_no_json_object_is_named(tmp_path, record, message):
    rows = rows_of(tmp_path / "a.array_record", [b"{}", record])
    assert rows[0] == {}
    with pytest.raises(DataError, match=rf"a\.array_record:record 2: {message}"):
        rows[1]


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "a.array_record"
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"a\.array_record: broken ArrayRecord file"):
        ArrayRecordRows(LocalBlob(str(path)), None)


def test_remote_files_are_refused(tmp_path):
    import fsspec

    fsspec.filesystem("memory").pipe("/records/a.array_record", b"x")
    with pytest.raises(DataError, match="ArrayRecord files are read from local folders only"):
        ArrayRecordRows(open_blob("memory://records/a.array_record"), None)
