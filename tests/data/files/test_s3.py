"""s3:// through s3fs, against moto's server on this machine: data, models, runs and exports.

Skipped where one of the two is not installed.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain.config import SourceSection
from jaxtrain.data.files import blobs
from jaxtrain.data.sources import DataError, Source
from jaxtrain.observe.status import read_status
from jaxtrain.remote import RemoteError, written_folder
from jaxtrain.session.mirror import local_run

moto = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")

ROWS = [{"text": f"row {number} " + "word " * (number % 50)} for number in range(2000)]


@pytest.fixture(scope="module")
def bucket():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for key, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()
        filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
        filesystem.makedirs("bucket", exist_ok=True)  # moto's objects outlive a server of its
        yield filesystem
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_parquet_and_json_lines_are_read_from_s3(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(blobs, "_BLOCK", 1 << 12)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=300)
    bucket.pipe("bucket/data/a.parquet", (tmp_path / "a.parquet").read_bytes())
    bucket.pipe("bucket/data/b.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    for path, expected in {"s3://bucket/data": ROWS * 2, "s3://bucket/data/*.parquet": ROWS}.items():
        source = Source(SourceSection(path=path))
        order = [len(expected) - 1, 0, 700, 1999, 5]
        assert len(source) == len(expected) and [source[i] for i in order] == [expected[i] for i in order]
    with pytest.raises(DataError, match=r"s3://bucket/none\.jsonl: no such file"):
        Source(SourceSection(path="s3://bucket/none.jsonl"))


def test_an_object_that_was_replaced_has_another_fingerprint(bucket):
    def fingerprint(word):
        bucket.pipe("bucket/a.jsonl", json.dumps({"text": word}).encode())
        bucket.invalidate_cache()
        s3fs.S3FileSystem.clear_instance_cache()
        return Source(SourceSection(path="s3://bucket/a.jsonl")).fingerprint()[0]["hash"]

    assert fingerprint("one") == fingerprint("one") != fingerprint("two")


def test_a_folder_is_uploaded_and_copied_back(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with written_folder("s3://bucket/models/a") as folder:
        write_byte_tokenizer(folder)
    assert load_tokenizer("s3://bucket/models/a").eos_token == "<|im_end|>"
    with pytest.raises(RemoteError, match="s3://bucket/models/a is not empty"), written_folder("s3://bucket/models/a"):
        pass


def test_the_status_of_a_run_at_s3_reads_no_checkpoint(bucket):
    files = {"config.yaml": b"recipe: sft\n", "metrics.jsonl": b'{"step": 12, "loss": 0.5}\n'}
    files |= {f"checkpoints/{step}/weights": bytes(9) for step in (4, 12)}
    for name, content in files.items():
        bucket.pipe(f"bucket/run/{name}", content)
    copy = local_run("s3://bucket/run", checkpoints=False)
    status = read_status(copy)
    assert (status["recipe"], status["metrics"]["loss"]) == ("sft", 0.5)
    assert (status["checkpoint"]["step"], status["checkpoint"]["kept"]) == (12, 2)
    assert not list(copy.rglob("weights"))
