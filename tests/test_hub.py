"""Names on the hub where a folder is expected. Nothing here reaches the network: the cache is made by hand."""

import shutil

import pytest

from converters.import_hf import read_config
from converters.tokenizer import load_tokenizer, write_byte_tokenizer
from jaxtrain import hub
from jaxtrain.hub import HubError, local_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._model_snapshot.cache_clear()
    yield
    hub._model_snapshot.cache_clear()


@pytest.fixture
def cached(tmp_path):
    def make(kind, name, files, revision="main"):
        repository = tmp_path / "cache" / f"{kind}s--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        for file, content in files.items():
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).write_text(content)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(COMMIT)
        return snapshot

    return make


def test_a_name_is_the_snapshot_in_the_cache(cached, tmp_path):
    snapshot = cached("model", "org/tiny-Model_1.5", {"config.json": "{}"}, revision="v2")
    write_byte_tokenizer(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", snapshot, dirs_exist_ok=True)
    assert local_folder("org/tiny-Model_1.5@v2") == snapshot
    assert load_tokenizer("org/tiny-Model_1.5@v2").eos_token == "<|im_end|>"
    with pytest.raises(ValueError, match="architecture None is not supported"):
        read_config("org/tiny-Model_1.5@v2")
    with pytest.raises(HubError, match=r"org/tiny-Model_1\.5: there is no such folder"):
        local_folder("org/tiny-Model_1.5")


def test_what_is_nowhere_names_the_command_that_downloads_it(tmp_path):
    with pytest.raises(HubError) as error:
        local_folder("nobody/no-such-model@refs/pr/3")
    message = str(error.value)
    assert "nobody/no-such-model@refs/pr/3: there is no such folder" in message
    assert "`hf download nobody/no-such-model --revision refs/pr/3`" in message
    assert f"the cache {tmp_path / 'cache'}" in message and "models--nobody--no-such-model" in message


def test_folders_and_what_can_only_be_a_path_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "org" / "model").mkdir(parents=True)
    for path in ("org/model", "runs/misspelt", "a/b/c", "./a/b", "/no/such", "~/model", "model", "org/"):
        assert str(local_folder(path)) == path.removeprefix("./").removesuffix("/")
