import json
import os
import resource
import socket
from functools import partial

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain.data.files.errors import DataError
from jaxtrain.data.files.find import KINDS, file_format, find_files, open_blob, open_rows
from jaxtrain.data.files.hub_datasets import METADATA


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.jsonl", "a.parquet", "inner/c.jsonl.gz", "README.md"):
        (tmp_path / name).write_bytes(b"{}\n")
    return tmp_path


@pytest.fixture
def bucket(folder):
    filesystem = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        filesystem.pipe(f"/find/data/{path.relative_to(folder)}", path.read_bytes())
    yield "memory://find/data"
    filesystem.rm("/find", recursive=True)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_folders_and_globs_are_sorted_by_name(folder, scheme):
    def names(path):
        return [name.removeprefix(f"{folder}/") for name in find_files(f"{scheme}{path}")]

    assert names(folder) == ["a.parquet", "b.jsonl", "inner/c.jsonl.gz"]
    assert names(folder / "*.jsonl") == ["b.jsonl"]
    assert names(folder / "**" / "*.jsonl*") == ["b.jsonl", "inner/c.jsonl.gz"]
    assert names(folder / "b.jsonl") == ["b.jsonl"]


@pytest.mark.parametrize("name", ["part-?.jsonl", "part-[01].jsonl", "p*.jsonl"])
def test_globs_of_a_url_are_those_of_a_folder(tmp_path, name):
    filesystem = fsspec.filesystem("memory")
    for file in ("part-0.jsonl", "part-1.jsonl", "other.jsonl"):
        filesystem.pipe(f"/globs/{file}", b"{}\n")
        (tmp_path / file).write_bytes(b"{}\n")
    expected = ["part-0.jsonl", "part-1.jsonl"]
    assert [file.rpartition("/")[2] for file in find_files(f"memory://globs/{name}")] == expected
    assert [file.rpartition("/")[2] for file in find_files(f"{tmp_path}/{name}")] == expected
    filesystem.rm("/globs", recursive=True)


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_that_datasets_saved_gives_its_rows_alone(tmp_path, remote):
    """The layout of `save_to_disk`, with what a later `map` has cached beside the rows."""
    files = {f"{split}/data-0000{n}-of-00002.arrow": b"" for split in ("train", "test") for n in (0, 1)}
    shards = [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]
    for split in ("train", "test"):
        files[f"{split}/state.json"] = json.dumps({"_data_files": shards, "_split": split}).encode()
        files[f"{split}/dataset_info.json"] = b"{}"
        files[f"{split}/cache-0123.arrow"] = b""
    files["dataset_dict.json"] = b'{"splits": ["train", "test"]}'
    root = "memory://saved" if remote else str(tmp_path)
    for name, content in files.items():
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(content)
    names = [name.rpartition("/")[2] for name in find_files(f"{root}/train")]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    with pytest.raises(DataError, match=r"a DatasetDict there: name the folder of one of its splits, as \S+/test or"):
        find_files(root)
    with fsspec.open(f"{root}/train/state.json", "wb") as file:
        file.write(b"[]")
    with pytest.raises(DataError, match=r"train/state\.json: is not what `datasets.save_to_disk` writes"):
        find_files(f"{root}/train")


def test_remote_folders_and_globs_are_sorted_by_name(bucket):
    def names(path):
        return [name.removeprefix("memory:///find/data/") for name in find_files(path)]

    assert names(bucket) == ["a.parquet", "b.jsonl", "inner/c.jsonl.gz"]
    assert names(f"{bucket}/*.jsonl*") == ["b.jsonl"]
    assert names(f"{bucket}/**/*.jsonl*") == ["b.jsonl", "inner/c.jsonl.gz"]
    assert find_files(f"{bucket}/b.jsonl") == [f"{bucket}/b.jsonl"]
    for missing in ("*.csv", "none.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            find_files(f"{bucket}/{missing}")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean .*/train\.jsonl\?"):
        find_files(f"{tmp_path}/trian.jsonl")
    with pytest.raises(DataError, match=f"nearest folder that exists is {tmp_path}"):
        find_files(f"{tmp_path}/no/such/train.jsonl")


def test_an_unknown_kind_of_file_names_the_known_ones(tmp_path):
    (tmp_path / "a.xls").write_text("a,b")
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv, \.jsonl\.gz, .*\.parquet"):
        find_files(f"{tmp_path}/a.xls")
    with pytest.raises(DataError, match="holds no data file"):
        find_files(str(tmp_path))


def test_config_and_split_are_for_the_hub(tmp_path):
    with pytest.raises(DataError, match="`config` and `split` are for data sets on the hub"):
        find_files(str(tmp_path), split="train")


def test_the_kind_of_a_file_is_its_longest_ending():
    assert [file_format(f"a{kind}") for kind in KINDS] == list(KINDS)
    assert file_format("a.array_record-00003-of-00010") == ".array_record"
    assert file_format("https://host/a.jsonl.gz?download=true") == ".jsonl.gz"
    assert file_format("https://host/download?file=a.csv&token=1") == ".csv"
    assert file_format("s3://bucket/a.jsonl?versionId=3") == file_format("s3://bucket/?.jsonl") == ".jsonl"
    assert file_format("a.md") is None and file_format("jsonl") is None


def test_a_json_file_is_read_as_an_array_or_as_lines(tmp_path):
    for content in ('[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n'):
        (tmp_path / "a.json").write_text(content)
        rows = open_rows(f"{tmp_path}/a.json", None, 1)
        assert [rows[index] for index in range(len(rows))] == [{"a": 1}, {"a": 2}]


def test_a_driver_that_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: reading s3:// needs a package .* pip install s3fs"):
        open_blob("s3://bucket/a.jsonl")
    with pytest.raises(DataError, match=r"gs://.*pip install gcsfs"):
        find_files("gs://bucket/*.parquet")


def test_a_protocol_that_nobody_knows_is_named():
    with pytest.raises(DataError, match=r"ftpx://host/a\.jsonl: .*ftpx"):
        find_files("ftpx://host/a.jsonl")


def test_hidden_files_of_a_folder_are_not_data(tmp_path):
    for name in ("a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "b/.c.jsonl", "b/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert find_files(str(tmp_path)) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b" / "d.jsonl")]


MANY = 1500


def _write_arrow(path, table, *, stream=False):
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table)


def _write_records(path, table):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in table.to_pylist():
        writer.write(json.dumps(row).encode())
    writer.close()


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", lambda path, table: path.write_text(json.dumps(table.to_pylist()[0]) + "\n")),
        (
            ".jsonl.zst",
            lambda path, table: path.write_bytes(zstandard.compress(json.dumps(table.to_pylist()[0]).encode())),
        ),
        (".parquet", lambda path, table: pq.write_table(table, path)),
        (".arrow", _write_arrow),
        (".feather", partial(_write_arrow, stream=True)),
        (".array_record", _write_records),
    ],
)
def test_there_may_be_more_files_than_a_process_may_open(tmp_path, monkeypatch, suffix, write):
    """Every file is read twice, since one that was opened may have been closed for others meanwhile."""
    monkeypatch.setattr("jaxtrain.data.files.compressed._LONG_FRAME", 8)  # every file needs a temporary one
    for number in range(MANY):
        write(tmp_path / f"{number:04d}{suffix}", pa.table({"text": [f"text {number}"]}))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        rows = [open_rows(name, None, MANY) for name in find_files(str(tmp_path))]
        for _ in range(2):
            assert [file[0]["text"] for file in rows] == [f"text {number}" for number in range(MANY)]
        assert len(os.listdir("/proc/self/fd")) < 800
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("remote", [False, True])
def test_files_that_describe_a_data_set_are_not_rows(tmp_path, remote):
    root = "memory://described" if remote else str(tmp_path)
    for name in ("a.json", *METADATA, "inner/dataset_info.json"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"{}")
    for path in (root, f"{root}/*.json"):
        assert [name.rpartition("/")[2] for name in find_files(path)] == ["a.json"]
    assert find_files(f"{root}/{METADATA[0]}") == [f"{root}/{METADATA[0]}"]


@pytest.mark.parametrize("remote", [False, True])
def test_what_is_not_read_of_a_folder_is_named(tmp_path, caplog, remote):
    root = "memory://others" if remote else str(tmp_path)
    for name in ("a.jsonl", "b.jsonl.bz2", "c.NDJSON", "README.md", "LICENSE", METADATA[0], "d-00001-of-00003.csv"):
        with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"{}")
    for path in (root, f"{root}/*"):
        caplog.clear()
        find_files(path)
        other, missing = caplog.messages
        assert other.endswith("2 files of an unknown kind are not read: b.jsonl.bz2, c.NDJSON")
        assert missing.endswith("2 of the 3 shards of d are missing")


@pytest.mark.parametrize("path", ["a.jsonl", "folder/", "folder/*.jsonl"])
def test_a_server_that_cannot_be_reached_is_not_a_missing_file(path):
    pytest.importorskip("aiohttp")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/{path}"
        with pytest.raises(DataError, match=r"cannot be reached: Client\w+: Cannot connect"):
            find_files(url)


def test_the_name_of_a_data_set_of_the_hub_is_recognised(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hub is written hf:org/data, .*`hf download org/data --repo-type dataset`"):
        find_files("org/data")
    with pytest.raises(DataError, match=r"give it as hf:org/data after `hf download org/data --repo-type dataset`"):
        find_files("hf://datasets/org/data/train.jsonl")
