import gzip
import json

import numpy as np
import pytest
import zstandard

from jaxtrain.config import SourceSection
from jaxtrain.data.files import text
from jaxtrain.data.sources import DataError, Source, read_rows

TRICKY = [
    {"text": 'a "quoted" \\ backslash \\" and \\\\', "n": [1, {"b": "]}"}]},
    {"text": "brackets ]}{[ and, commas", "n": []},
    {"text": "\n\r\n\u2028é", "n": None},
    {"text": "\\", "n": [[], {}]},
    {"": "", "n": "}"},
]


def source(path, **section):
    return Source(SourceSection(path=str(path), **section))


def read(path, **section):
    return list(read_rows(SourceSection(path=str(path), **section)))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(params=[None, 1, 7, 64], ids=lambda size: f"scan={size}")
def scan_bytes(request, monkeypatch):
    monkeypatch.setattr(text, "_HEAD_BYTES", 110)
    if request.param:
        monkeypatch.setattr("jaxtrain.data.files.blobs.SCAN_BYTES", request.param)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("limit", [None, 1, 3, 5, 9])
def test_a_json_array_gives_its_objects(tmp_path, scan_bytes, indent, limit):
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(TRICKY, indent=indent) + "\n ")
    assert read(path, limit=limit) == TRICKY[:limit]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst", "a.jsonl"])
def test_a_json_file_may_hold_lines(tmp_path, name):
    content = lines(TRICKY).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get((tmp_path / name).suffix, bytes)(content)
    (tmp_path / name).write_bytes(packed)
    assert read(tmp_path / name) == TRICKY


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    for name, content in {"a.json": json.dumps(TRICKY), "b.json": lines(TRICKY), "c.jsonl": lines(TRICKY)}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(tmp_path / name) == TRICKY
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfa,b\n1,x\n")
    assert read(tmp_path / "d.csv") == [{"a": "1", "b": "x"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "elements of the array must be JSON objects"),
        ('["a"]', "elements of the array must be JSON objects"),
        ("[]", "holds no rows"),
        ('[{"a": 1}, {"a": 2}', "the array is not closed"),
        ('[{"a": 1},', "the array is not closed"),
        ('[{"a": 1}, {"a"', "the array is not closed"),
        ('[{"a": 1} {"a": 2}]', r"a\.json:1: the row must be followed by a comma"),
        ('[{"a": 1}, 5, {"a": 2}]', r"a\.json:1: the row must be followed by a comma"),
        ('[{"a": 1}] x', "the array is not closed"),
        ('[\n{"a": 1},\n{"a" 2}]', r"a\.json:3: broken JSON: Expecting ':' delimiter"),
        ('{"a": 1}\n{"a"', r"a\.json:2: broken JSON"),  # a row that was cut off, and begins as the first does
        ('{\n "a": 1\n}', r"a\.json:1: a JSON object over several lines.*`jq -c '\.' a\.json > rows\.jsonl`"),
        ('{"data": [{\n "a": 1\n}]}', r"a\.json:1: .* several lines.*`jq -c '\.\"data\"\[\]' a\.json.* under 'data'"),
    ],
)
def test_what_is_wrong_in_a_json_array_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


def test_csv_is_quoted_text(tmp_path, scan_bytes):
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,"the, answer",score,good,day\n"two\nlines ""x""",007,0.50,true,2024-01-02\n\nplain é,,1,false,\n'
        '"last",-3,1e3,NA,x'
    )
    assert read(path) == [
        {"prompt": 'two\nlines "x"', "the, answer": "007", "score": "0.50", "good": "true", "day": "2024-01-02"},
        {"prompt": "plain é", "the, answer": "", "score": "1", "good": "false", "day": ""},
        {"prompt": "last", "the, answer": "-3", "score": "1e3", "good": "NA", "day": "x"},
    ]
    opened = source(path)
    assert [opened.place(index).rpartition(":")[2] for index in range(3)] == ["2", "5", "6"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3,4\n", "first line must be a header .* it has '1', '2'"),
        ("a,a\n1,2\n", "first line must be a header .* it has 'a', 'a'"),
        ("a,\n1,2\n", "first line must be a header .* it has ''"),
        ("a,b\n", "holds no rows"),
        ("", "holds no rows"),
        ("a,b\n1,2\n3\n", r"a\.csv:3: a value that cannot be read: .*Expected 2 columns, got 1"),
        ('a,b\n1,2\nx 5" y,3\nx 6" y,4\n', r"a\.csv:3: a field with quotes in it must be quoted"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv")


def test_a_csv_value_that_cannot_be_read_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtrain.data.files.blobs.SCAN_BYTES", 32)
    monkeypatch.setattr(text, "_HEAD_BYTES", 32)
    path = tmp_path / "a.csv"
    content = "n,text\n" + "".join(f"{number},word\n" for number in range(20))
    path.write_bytes(content.encode() + b"20,\xff\n21,word\n")
    opened = source(path)
    assert opened[0] == {"n": "0", "text": "word"} and opened[21] == {"n": "21", "text": "word"}
    with pytest.raises(DataError, match=r"a\.csv:22: a value that cannot be read: .*UTF8"):
        opened[20]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("most", [1, 3, 10])
@pytest.mark.parametrize("limit", [None, 1, 33, 64, 100])
def test_few_starts_are_kept_of_many_rows(tmp_path, monkeypatch, name, most, limit):
    """The memory for the index is bounded; the rows between the starts that are kept are found again."""
    monkeypatch.setattr(text, "_MAX_STARTS", most)
    monkeypatch.setattr(text, "_HEAD_BYTES", 40)
    monkeypatch.setattr("jaxtrain.data.files.blobs.SCAN_BYTES", 50)
    rows = [{"a": number, "b": f"text {number}\n"} for number in range(100)]
    content = {
        "a.jsonl": "\n \n".join(map(json.dumps, rows)),
        "a.json": json.dumps(rows, indent=1),
        "a.csv": "a,b\n" + "".join(f'{row["a"]},"{row["b"]}"\n' for row in rows),
    }[name]
    (tmp_path / name).write_text(content)
    opened = source(tmp_path / name, limit=limit)
    (inner,) = opened._files
    assert len(inner._starts) <= most + 8 and len(opened) == len(rows[:limit])
    order = np.random.default_rng(0).permutation(len(opened)).tolist()
    expected = [{key: str(value) for key, value in row.items()} for row in rows] if name == "a.csv" else rows
    assert [opened[index] for index in order] == [expected[index] for index in order]
    first = {"a.jsonl": 1, "a.json": 2, "a.csv": 2}[name]
    each = {"a.jsonl": 2, "a.json": 4, "a.csv": 2}[name]
    assert all(opened.place(index).endswith(f"{name}:{first + each * index}") for index in (0, len(opened) - 1))


def test_a_row_without_end_is_an_error_and_not_a_full_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_MAX_BYTES", 1000)
    monkeypatch.setattr(text, "_HEAD_BYTES", 40)
    monkeypatch.setattr("jaxtrain.data.files.blobs.SCAN_BYTES", 100)
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3," ' + "4,5\n" * 1000)
    with pytest.raises(DataError, match=r"a\.csv: from byte 8 on, .*make no complete row; is .* a quote missing"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_of_wide_characters_is_named(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(("text\nhi\n" if name == "a.csv" else lines([{"text": "hi"}])).encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: the file is UTF-16 or UTF-32 and must be UTF-8: `iconv"):
        read(tmp_path / name)


@pytest.mark.parametrize("content", [b"a,b\r1,2\r", b"a,b\n1\r,2\n"], ids=["header", "row"])
def test_carriage_returns_alone_are_named(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv.* cannot be read: .*lines must end with a line feed"):
        read(tmp_path / "a.csv")


def test_a_compressed_file_without_its_suffix_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(DataError, match=r"rows\.jsonl: the file is compressed: give it a name that ends with \.gz"):
        source(file)
