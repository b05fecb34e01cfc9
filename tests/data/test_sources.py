import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from chat_templates import CHATML, tokenizer

from jaxtrain.config import SourceSection
from jaxtrain.data.formats import Encoder
from jaxtrain.data.sources import DataError, Source, read_rows

CHAT = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "Paris"}]
ROWS = [{"text": f"row {number} é\u2028"} for number in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write(path, rows=ROWS):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_bytes(lines)
    return path


def read(path, **section):
    return list(read_rows(SourceSection(path=str(path), **section)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("limit", [None, 1, 8, 99])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, limit):
    assert read(write(tmp_path / name), limit=limit) == ROWS[:limit]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_are_given_in_any_order(tmp_path, name):
    source = Source(SourceSection(path=str(write(tmp_path / name))))
    assert [source[i] for i in (19, 0, 7, 6)] == [ROWS[i] for i in (19, 0, 7, 6)]


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "inner").mkdir()
    write(tmp_path / "b.jsonl", ROWS[8:15])
    write(tmp_path / "a.parquet", ROWS[:8])
    write(tmp_path / "inner" / "c.jsonl.gz", ROWS[15:])
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == ROWS
    assert read(tmp_path / "*.jsonl") == ROWS[8:15]
    assert read(tmp_path / "**" / "*.jsonl*") == ROWS[8:]
    assert read(tmp_path, limit=10) == ROWS[:10]


def test_blank_lines_and_a_missing_last_line_break_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\r\n" + LINES.replace(b"\n", b"\r\n\n") + b"{}")
    assert read(path) == [*ROWS, {}]
    assert read(path, limit=20) == ROWS


@pytest.mark.parametrize("blank", [b"", b" ", b"     ", b"\t \x0b\x0c ", b" " * 100, b"\r"])
@pytest.mark.parametrize("scan", [None, 16])
def test_lines_of_whitespace_are_blank_however_long(tmp_path, monkeypatch, blank, scan):
    if scan:
        monkeypatch.setattr("jaxtrain.data.files.blobs.SCAN_BYTES", scan)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + blank + b'\n  {"a": 2}\n' + blank + b"\n" + blank)
    assert read(path) == [{"a": 1}, {"a": 2}]
    assert read(path, limit=1) == [{"a": 1}] and read(path, limit=2) == [{"a": 1}, {"a": 2}]
    source = Source(SourceSection(path=str(path)))
    assert source.place(1).endswith(":3")
    path.write_bytes(blank + b"\n" + blank)
    with pytest.raises(DataError, match="holds no rows"):
        read(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": ' + "9" * 5000 + "}", "a number that cannot be read"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
    ],
)
def test_what_python_cannot_hold_is_a_bad_row(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + line + '\n{"a": 2}\n')
    source = Source(SourceSection(path=str(path)))
    assert source[0] == {"a": 1} and source[2] == {"a": 2}
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{reason}"):
        source[1]


def test_a_parquet_value_that_cannot_be_read_is_a_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pa.array([b"good", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    source = Source(SourceSection(path=str(path)))
    assert source[0] == {"text": "good"}
    with pytest.raises(DataError, match=r"a\.parquet:row 2: a value that cannot be read"):
        source[1]


def test_null_columns_of_parquet_are_null_and_not_missing(tmp_path):
    path = write(tmp_path / "a.parquet", [{"q": "a", "c": "b"}, {"q": None, "c": "b"}])
    assert read(path, columns={"prompt": "q", "completion": "c"})[1] == {"prompt": None, "completion": "b"}


def test_a_fault_of_a_row_is_named_with_its_place(tmp_path):
    source = Source(SourceSection(path=str(write(tmp_path / "a.jsonl"))))
    assert source.make(3, lambda row: row["text"]) == ROWS[3]["text"]

    def refuse(row):
        raise ValueError("no")

    with pytest.raises(DataError, match=r"a\.jsonl:4: no"):
        source.make(3, refuse)


def test_a_broken_line_is_named_with_its_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "good"}\n{"text": "bad\n[1]\n\xff\n')
    source = Source(SourceSection(path=str(path)))
    assert source[0] == {"text": "good"}
    faults = [
        (1, 3, "broken JSON: .* character 10"),
        (2, 4, "a row must be a JSON object, not list"),
        (3, 5, "invalid UTF-8"),
    ]
    for index, line, message in faults:
        with pytest.raises(DataError, match=rf"a\.jsonl:{line}: {message}"):
            source[index]


def test_the_line_is_the_files_own_where_there_are_several(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:3])
    (tmp_path / "b.jsonl").write_text('{}\n{"text"\n')
    source = Source(SourceSection(path=str(tmp_path)))
    assert source.place(4).endswith("b.jsonl:2")
    with pytest.raises(DataError, match=r"b\.jsonl:2"):
        source[4]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_without_rows_is_an_error(tmp_path, name):
    with pytest.raises(DataError, match="holds no rows"):
        read(write(tmp_path / name, []))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_cut_off_file_is_an_error_that_names_it(tmp_path, name, keep):
    path = write(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)] or b"x")
    with pytest.raises(DataError, match=rf"{name}: broken"):
        read(path)


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "messages": 1, "tools": 2}])
    assert read(path, columns={"prompt": "question", "completion": "answer"}) == [
        {"prompt": "q", "completion": "a", "tools": 2}
    ]
    assert read(path, columns={"prompt": "question"}) == [{"prompt": "q", "tools": 2}]


def test_a_column_map_that_fits_nothing_names_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: there is no column 'questoin'; did you mean 'question'"):
        read(path, columns={"prompt": "questoin"})
    with pytest.raises(DataError, match="'promt' is not one of our columns; did you mean 'prompt'"):
        read(path, columns={"promt": "question"})


def test_the_nulls_that_parquet_adds_are_left_out(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}]
    assert read(write(tmp_path / "a.parquet", rows)) == rows


def test_rows_of_a_program_read_as_those_of_a_file_do():
    rows = [{"question": "a", "answer": "b", "more": [1]}, {"question": "c", "answer": "d", "more": [2]}]
    section = SourceSection.model_validate({"rows": rows, "columns": {"prompt": "question", "completion": "answer"}})
    source = Source(section)
    assert [source[number]["prompt"] for number in range(len(source))] == ["a", "c"]
    kept = Source(section, keep_columns=True)
    kept[0]["more"].append(9)
    assert kept[0]["more"] == [1]
    with pytest.raises(DataError, match=r"rows:\w+:row 2: too bad"):
        source.make(1, lambda row: (_ for _ in ()).throw(ValueError("too bad")))
    assert len(Source(section.model_copy(update={"limit": 1}))) == 1


def test_rows_that_only_their_fingerprint_is_left_of_are_named():
    with pytest.raises(DataError, match="rows:12ab: these rows were given by a program"):
        Source(SourceSection(path="rows:12ab"))


def test_a_column_of_another_meaning_is_not_read(tmp_path):
    row = {"messages": CHAT, "reasoning": "off", "weight": "heavy", "score": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    encode = Encoder(tokenizer(CHATML))
    unread = {}
    for column in ("reasoning", "weight"):
        with pytest.raises(DataError, match=rf"data\.train\.columns={{{column}: null}} leaves out"):
            Source(SourceSection(path=str(tmp_path / "a.jsonl"), columns=unread)).make(0, encode)
        unread = unread | {column: None}
    source = Source(SourceSection(path=str(tmp_path / "a.jsonl"), columns=unread))
    assert source[0] == {"messages": CHAT, "score": 1} and not source.left_out
    source.make(0, encode)
    mapped = Source(SourceSection(path=str(tmp_path / "a.jsonl"), columns={"weight": None, "text": "weight"}))
    assert mapped[0] == {"text": "heavy"}
    kept = Source(SourceSection(path=str(tmp_path / "a.jsonl"), columns=unread), keep_columns=True)
    assert kept[0] == source[0]
