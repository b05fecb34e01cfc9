"""Models, tokenizers and exports at URLs: copied into a cache, and uploaded."""

import json
import os

import fsspec
import pytest

from converters.import_hf import read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain import hub
from jaxtrain.remote import RemoteError, copied_folder, filesystem_of, is_url, version, written_folder

URL = "memory://remote/model"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder at a URL, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub._copy.cache_clear()
    write_byte_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"other")
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(tmp_path / "model"), "/remote/model", recursive=True)
    yield filesystem
    filesystem.rm("/remote", recursive=True)
    hub._copy.cache_clear()


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/a") and not is_url("file:///a") and not is_url("a/b")


def test_a_tokenizer_and_a_config_are_read_from_a_url(model, tmp_path):
    assert load_tokenizer(URL).eos_token == "<|im_end|>"
    copied = sorted(os.listdir(hub.local_folder(URL, weights=False)))
    assert "tokenizer.json" in copied and "model.safetensors" not in copied
    with pytest.raises(ValueError, match="architecture None is not supported"):
        read_config(URL)
    folder = hub.local_folder(URL)
    assert (folder / "model.safetensors").read_bytes() == b"weights" and not (folder / "pytorch_model.bin").exists()
    assert hub.local_folder(f"file://{tmp_path}/model") == tmp_path / "model"


def test_only_what_changed_is_copied_again(model, monkeypatch):
    copied_folder(URL, ["*.json", "*.safetensors"])
    copies = []
    get_file = type(model).get_file
    monkeypatch.setattr(
        type(model), "get_file", lambda self, remote, local: copies.append(remote) or get_file(self, remote, local)
    )
    copied_folder(URL, ["*.json", "*.safetensors"])
    assert copies == []
    model.pipe("/remote/model/config.json", b"[]")
    model.rm("/remote/model/model.safetensors")
    folder = copied_folder(URL, ["*.json", "*.safetensors"])
    assert copies == ["/remote/model/config.json"]
    assert (folder / "config.json").read_text() == "[]" and not (folder / "model.safetensors").exists()


def test_what_is_not_there_is_named(model):
    for url in ("memory://remote/none", "memory://remote/model/config.json"):
        with pytest.raises(RemoteError, match=f"{url}: "):
            copied_folder(url, ["*.safetensors"])
    with pytest.raises(RemoteError, match=r"the folder does not exist, or holds none of \*\.gguf"):
        copied_folder(URL, ["*.gguf"])
    with pytest.raises(RemoteError, match=r"ftpx://host/a: .*ftpx"):
        filesystem_of("ftpx://host/a")


def test_a_version_may_include_times():
    info = {"size": 3, "ETag": "a", "LastModified": 5, "name": "x"}
    assert version(info) == {"ETag": "a"} and version(info, times=True) == {"ETag": "a", "LastModified": "5"}


def test_a_folder_is_uploaded_once_it_is_complete(model, tmp_path):
    url = "memory://remote/out"
    with pytest.raises(KeyError), written_folder(url) as folder:
        folder.mkdir()
        (folder / "a.json").write_text("{}")
        raise KeyError
    assert not model.exists("/remote/out")
    with written_folder(url) as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "a.json").write_text(json.dumps([1]))
        (folder / "b.json").write_text("{}")
    assert not folder.exists()
    assert model.cat("/remote/out/inner/a.json") == b"[1]" and model.cat("/remote/out/b.json") == b"{}"
    with pytest.raises(RemoteError, match="memory://remote/out is not empty"), written_folder(url):
        pass
    with written_folder(tmp_path / "local") as folder:
        assert folder == tmp_path / "local"
