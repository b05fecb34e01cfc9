"""Fingerprints of a run's files: the same for a copy, another for other content."""

import os

import pytest

from jaxtrain.session.inputs import changed_file, fingerprint_path


@pytest.mark.parametrize("size", [10, 3 << 20], ids=["hashed in full", "sampled"])
@pytest.mark.parametrize("change", ["first byte", "last byte", "one byte more"])
def test_a_copy_has_the_same_fingerprint_and_a_changed_file_another(tmp_path, size, change):
    content = bytearray(os.urandom(size))
    for name in ("one", "copy"):
        (tmp_path / name).write_bytes(content)
    before = fingerprint_path("data.train.path", str(tmp_path / "one"))
    assert fingerprint_path("data.train.path", str(tmp_path / "copy")) == before
    if change == "one byte more":
        content += b"x"
    else:
        content[0 if change == "first byte" else -1] ^= 1
    (tmp_path / "one").write_bytes(content)
    assert fingerprint_path("data.train.path", str(tmp_path / "one")) != before


def test_a_folder_of_data_is_its_data_files_wherever_it_lies(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder / "part").mkdir(parents=True)
        (tmp_path / folder / "part" / "a.jsonl").write_text("{}\n")
    (tmp_path / "here" / "notes.txt").write_text("no data")
    here, there = (fingerprint_path("data.train.path", str(tmp_path / name)) for name in ("here", "there"))
    assert here == there and list(here) == ["part/a.jsonl"]
    assert fingerprint_path("data.train.path", str(tmp_path / "here" / "*" / "*.jsonl")).keys() == {"a.jsonl"}
    assert fingerprint_path("data.train.path", str(tmp_path / "nowhere")) == {}  # reported by whoever reads it


def test_a_models_folder_is_what_is_read_of_it(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    assert fingerprint_path("model.path", str(tmp_path)).keys() == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("new", "told"),
    [
        ({"a": "1", "b": "2"}, None),
        ({"a": "1", "b": "3"}, "b has other content"),
        ({"a": "1"}, "b is missing"),
        ({"a": "1", "b": "2", "c": "3"}, "c is new"),
    ],
)
def test_the_first_file_that_differs_is_named(new, told):
    assert changed_file({"a": "1", "b": "2"}, new) == told


def test_a_single_file_has_no_name():
    assert changed_file({"": "1"}, {"": "2"}) == "it has other content"
