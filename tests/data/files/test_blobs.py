"""Remote files: fsspec's memory file system, and an HTTP server with range requests on this machine."""

import gzip
import http.server
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxtrain.config import SourceSection
from jaxtrain.data.files import blobs, text
from jaxtrain.data.sources import DataError, Source

ROWS = [{"text": f"row {number} " + "word " * (number % 50)} for number in range(2000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "c.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "d.parquet", row_group_size=300)
    with pa.ipc.new_file(str(folder / "e.arrow"), pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=300)
    (folder / "f.jsonl.zst").write_bytes(zstandard.compress(LINES))
    (folder / "README.md").write_text("no data")
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    folder, ranges, requests = None, True, []

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        path = self.folder / self.path.partition("?")[0].strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), self.headers.get("Range")
        part = self.ranges and wanted
        body = data
        if part:
            start, stop = wanted.removeprefix("bytes=").split("-")
            body = data[int(start) : int(stop) + 1]
        self.requests.append((self.command, wanted))
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(body) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes" if self.ranges else "none")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(files, request):
    pytest.importorskip("aiohttp")
    handler = type("Served", (Handler,), {"folder": files, "ranges": getattr(request, "param", True), "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", handler.requests
        running.shutdown()
        thread.join()


def opened(url, **section):
    return Source(SourceSection(path=url, **section))


def check(source):
    assert len(source) == len(ROWS)
    for index in (1999, 0, 700, 701, 3, 1500):
        assert source[index] == ROWS[index]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "e.arrow", "f.jsonl.zst?download=true"]
)
def test_files_are_read_through_http_by_ranges(server, monkeypatch, name):
    monkeypatch.setattr(blobs, "_BLOCK", 1 << 12)
    url, requests = server
    check(opened(f"{url}/{name}"))
    assert all(wanted for command, wanted in requests if command == "GET"), requests


def test_rows_are_read_from_blocks_that_are_held(server, monkeypatch):
    monkeypatch.setattr(blobs, "_BLOCK", 1 << 12)
    url, requests = server
    source = opened(f"{url}/a.jsonl?download=true")
    before = len(requests)
    assert [source[index] for index in range(len(ROWS))] == ROWS
    assert len(requests) == before  # the pass that found the rows has left all blocks in the cache


@pytest.mark.parametrize("server", [False], indirect=True)
def test_a_server_without_ranges_is_named(server, monkeypatch):
    monkeypatch.setattr(blobs, "_BLOCK", 1 << 12)
    monkeypatch.setattr(blobs, "SCAN_BYTES", 1 << 14)
    monkeypatch.setattr(text, "_HEAD_BYTES", 1 << 10)
    url, _ = server
    with pytest.raises(DataError, match=r"a\.jsonl: of the bytes from .* or the server has no range requests"):
        opened(f"{url}/a.jsonl")


def test_a_missing_remote_file_is_named(server):
    url, _ = server
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        opened(f"{url}/none.jsonl")


@pytest.fixture
def memory(files):
    filesystem = fsspec.filesystem("memory")
    for path in files.iterdir():
        filesystem.pipe(f"/bucket/data/{path.name}", path.read_bytes())
    yield filesystem
    filesystem.rm("/bucket", recursive=True)


def test_the_fingerprint_of_a_remote_file_changes_with_its_content(memory):
    def digest():
        return opened("memory://bucket/data/a.jsonl").fingerprint()[0]

    before = digest()
    assert before == digest() and before["rows"] == len(ROWS) and before["bytes"] == len(LINES)
    memory.pipe("/bucket/data/a.jsonl", LINES.replace(b"row 1999", b"row 9999"))
    assert digest()["hash"] != before["hash"]


def test_bytes_that_the_server_does_not_send_are_an_error(memory, monkeypatch):
    source = opened("memory://bucket/data/a.jsonl")
    (rows,) = source._files
    rows._blob._number = -1  # nothing of it is in the cache
    memory.pipe("/bucket/data/a.jsonl", LINES[:100])
    with pytest.raises(DataError, match=r"a\.jsonl: of the bytes from .* the server sent"):
        source[1999]


def test_a_remote_folder_is_read_up_to_the_limit(memory):
    assert len(opened("memory://bucket/data")) == 6 * len(ROWS)
    assert len(opened("memory://bucket/**/*.parquet", limit=301)) == 301
    check(opened("memory://bucket/data/d.parquet"))


def test_file_urls_are_local_paths(files):
    check(opened(f"file://{files}/a.jsonl"))
    assert len(opened(f"file://{files}/*.jsonl")) == len(ROWS)


def test_a_local_file_that_was_replaced_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    blob = blobs.LocalBlob(str(path))
    assert blob.read(5, 9) == LINES[5:9] and blob.read(len(LINES) - 2, len(LINES) + 9) == LINES[-2:]
    digest = blob.digest()
    blobs._open.cache_clear()
    path.write_bytes(LINES[:-1])
    with pytest.raises(DataError, match=r"a\.jsonl: was replaced or changed while the run reads it"):
        blob.read(5, 9)
    assert blobs.LocalBlob(str(path)).digest() != digest
