"""Reads files of the safetensors package, which reads ours; errors name invalid files."""

import json
import os
import struct
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import safetensors_io
from converters.errors import ConversionError
from converters.safetensors_io import TensorSpec, open_checkpoint, plan_files, read_header, write_checkpoint

RNG = np.random.default_rng(0)
TENSORS = {
    "wide": RNG.standard_normal((6, 40_000)).astype(np.float32),
    "tall": RNG.standard_normal((3000, 24)).astype(ml_dtypes.bfloat16),
    "deep": RNG.standard_normal((5, 6, 7)).astype(np.float16),
    "flat": RNG.standard_normal(33).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.asarray(3.5, np.float32),
}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def rectangles(shape):
    for _ in range(20):
        starts = [int(RNG.integers(0, size + 1)) for size in shape]
        yield tuple(slice(a, int(RNG.integers(a, size + 1))) for a, size in zip(starts, shape, strict=True))


def test_reads_mixed_dtypes_whole_and_by_rectangle(folder):
    with open_checkpoint(folder) as checkpoint:
        for name, stored in TENSORS.items():
            assert checkpoint.dtype(name) == stored.dtype
            np.testing.assert_array_equal(checkpoint.read(name), stored)
            for index in rectangles(stored.shape):
                np.testing.assert_array_equal(checkpoint.read(name, index), stored[index])


def test_gaps_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_PIECE", 1000)  # 20 rows of "tall" at a time
    index = (slice(7, 2903), slice(5, 9))
    with open_checkpoint(folder) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("tall", index), TENSORS["tall"][index])


def test_reads_only_the_bytes_of_a_rectangle(folder, monkeypatch):
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(real(*args)) or read[-1])
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("wide", (slice(1, 5), slice(10_000, 20_000)))
        assert sum(read) == 4 * 10_000 * 4
        read.clear()
        checkpoint.read("tall", (slice(100, 200), slice(0, 24)))
        assert sum(read) == 100 * 24 * 2


def test_written_files_are_read_by_the_package(tmp_path):
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in TENSORS.items()]
    write_checkpoint(tmp_path, plan_files(specs, 10**9), TENSORS.__getitem__)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_large_checkpoints_are_split_into_files_with_an_index(tmp_path):
    names = [f"layers.{i}.w" for i in range(12)]
    specs = [TensorSpec(name, np.dtype(np.float32), (25,)) for name in names]
    write_checkpoint(tmp_path, plan_files(specs, 350), lambda name: np.full(25, names.index(name), np.float32))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1200
    assert list(index["weight_map"]) == names  # layer 2 before layer 10
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    with open_checkpoint(tmp_path) as checkpoint:
        assert [checkpoint.read(name)[0] for name in names] == list(range(12))


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ConversionError, match=r"model\.safetensors is truncated: \d+ bytes, its header says \d+"):
        open_checkpoint(folder)


def test_file_with_bytes_beyond_its_header(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ConversionError, match="longer than its header says"):
        open_checkpoint(folder)


HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_TEXT = b'{"w": %(w)s, "w": %(w)s}' % {b"w": json.dumps(HEADER).encode()}
TWICE = struct.pack("<Q", len(_TEXT)) + _TEXT + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file, or truncated: 0 bytes"),
        (b"garbage!" * 50, "not a safetensors file, or truncated"),
        (struct.pack("<Q", 20) + b"{" * 40, "invalid safetensors header"),
        (struct.pack("<Q", 8) + b'["list"]', "invalid safetensors header"),
        ({"w": {"shape": [2], "data_offsets": [0, 8]}}, "invalid safetensors header: 'dtype'"),
        ({"w": {**HEADER, "data_offsets": [0, 4]}}, r"bytes 0 to 4 for F32 \[2\]"),
        ({"w": {**HEADER, "dtype": "F12"}}, "unknown dtype F12"),
        ({"w": {**HEADER, "data_offsets": [0.0, 8.0]}}, "not all are integers from 0"),
        ({"w": {**HEADER, "shape": [-1, -2]}}, "not all are integers from 0"),
        ({"w": {**HEADER, "shape": [2, True]}}, "not all are integers from 0"),
        ({"w": HEADER, "__metadata__": {"format": 3}}, "__metadata__ holds something other than strings"),
        ({"v": HEADER, "w": HEADER}, "tensor w overlaps v"),
        ({"w": {**HEADER, "shape": [1], "data_offsets": [4, 8]}}, "tensor w leaves a gap after the header"),
        (struct.pack("<Q", 50_000) + b"[" * 50_000, "invalid safetensors header"),
        (TWICE, "it names w twice"),
    ],
)
def test_broken_headers(tmp_path, content, message):
    if isinstance(content, dict):
        text = json.dumps(content).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        read_header(tmp_path / "model.safetensors")


def test_a_quantised_tensor_is_refused_by_name(tmp_path):
    save_file({"w": np.ones(4, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="tensor w is I8; only F32, F16, BF16"):
        open_checkpoint(tmp_path).dtype("w")


def test_pickles_are_refused_with_advice(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConversionError, match=r"pickled weights only \(pytorch_model.bin\).*save_pretrained"):
        open_checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path):
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"index\.json; it holds model-00001-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_folder_names_the_nearest(tmp_path):
    (tmp_path / "qwen3-base").mkdir()
    with pytest.raises(ConversionError, match=r"no checkpoint folder .*qwen3-bsae; did you mean qwen3-base\?"):
        open_checkpoint(tmp_path / "qwen3-bsae")


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_index_that_names_a_missing_file(tmp_path):
    index(tmp_path, {"w": "model-00001-of-00001.safetensors"})
    with pytest.raises(
        ConversionError, match=r"names model-00001-of-00001\.safetensors \(for w\), which does not exist"
    ):
        open_checkpoint(tmp_path)


def test_index_that_disagrees_with_its_files(tmp_path):
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(4, np.float32)}, tmp_path / "2.safetensors")
    index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    with pytest.raises(ConversionError, match=r"puts tensor b into 1\.safetensors, which does not hold it"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_several_files_is_read_as_transformers_reads_it(tmp_path):
    """From the last file in sorted order, regardless of the index; a warning names the tensor if the copies differ."""
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "1.safetensors")
    save_file({"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}, tmp_path / "2.safetensors")
    index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(tmp_path)
    save_file({"a": np.full(4, 2, np.float32), "b": np.ones(4, np.float32)}, tmp_path / "2.safetensors")
    with pytest.warns(UserWarning, match=r"tensor a is in both 1\.safetensors and 2\.safetensors"):
        checkpoint = open_checkpoint(tmp_path)
    with checkpoint:
        assert checkpoint.read("a").tolist() == [2] * 4


def test_files_in_folders_below(tmp_path):
    (tmp_path / "below").mkdir()
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "below" / "1.safetensors")
    index(tmp_path, {"a": "below/1.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [1] * 4


@pytest.mark.parametrize(
    "file", ["../1.safetensors", "below/../../1.safetensors", "/{absolute}/1.safetensors", "..\\1", 7]
)
def test_an_index_that_leaves_its_folder_is_refused_before_anything_is_opened(file, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "1.safetensors")
    save_file({"v": np.ones(4, np.float32)}, folder / "0.safetensors")
    file = file.format(absolute=tmp_path) if isinstance(file, str) else file
    index(folder, {"v": "0.safetensors", "w": file})
    monkeypatch.setattr(safetensors_io, "read_header", lambda file: pytest.fail(f"{file} was opened"))
    with pytest.raises(ConversionError, match=r"which is outside of the folder|which is not a file name"):
        open_checkpoint(folder)


def test_broken_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"index\.json: weight_map must be an object, not None"):
        open_checkpoint(tmp_path)
