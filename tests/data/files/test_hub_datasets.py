"""Data sets on the hub: which files are a split. The cache is made by hand, and the network is not used."""

import json
from types import SimpleNamespace

import pytest

from jaxtrain.config import SourceSection
from jaxtrain.data.sources import DataError, Source
from jaxtrain.hub import with_owner

COMMIT = "0123456789abcdef0123456789abcdef01234567"
README = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - {split: test, path: [main/test-00000-of-00001.jsonl]}
- config_name: socratic
  data_files: socratic/*.jsonl
---
# A data set
"""


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(*names, readme=None):
        repository = tmp_path / "datasets--org--data"
        for name in names:
            path = repository / "snapshots" / COMMIT / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")
        if readme:
            (repository / "snapshots" / COMMIT / "README.md").write_text(readme)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)

    return make


def read(path="hf:org/data", **section):
    source = Source(SourceSection(path=path, **section))
    return [source[index]["text"] for index in range(len(source))]


DECLARED = (
    *("main/train-00000-of-00002.jsonl", "main/train-00001-of-00002.jsonl", "main/test-00000-of-00001.jsonl"),
    *("socratic/a.jsonl", "other.csv"),
)


def test_the_readme_says_which_files_are_a_split(data_set):
    data_set(*DECLARED, readme=README)
    assert read(config="main", split="train") == list(DECLARED[:2])
    assert read(config="main", split="test") == ["main/test-00000-of-00001.jsonl"]
    assert read(config="socratic") == ["socratic/a.jsonl"]
    assert read(f"hf:org/data@{COMMIT}", config="socratic", split="train") == ["socratic/a.jsonl"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "hf:org/data: name one with `config`: it has main, socratic"),
        ({"config": "mian"}, "hf:org/data: there is no config 'mian': it has main, socratic"),
        ({"config": "main"}, "hf:org/data: name one with `split`: it has train, test"),
        ({"config": "main", "split": "train[:10]"}, r"there is no split 'train\[:10\]': it has train, test"),
    ],
)
def test_what_has_to_be_named_is_said(data_set, section, message):
    data_set(*DECLARED, readme=README)
    with pytest.raises(DataError, match=message):
        read(**section)


@pytest.mark.parametrize(
    ("names", "section", "expected"),
    [
        (["data/train-0-of-1.jsonl", "data/validation-0-of-1.jsonl"], {"split": "validation"}, 1),
        (["train.jsonl", "test.jsonl"], {"split": "train"}, 0),
        (["my_dev_set.jsonl", "train/x.jsonl"], {"split": "validation"}, 0),
        (["anything.jsonl"], {}, 0),
        (["one/train.jsonl", "two/train.jsonl"], {"config": "two"}, 1),
    ],
)
def test_without_a_word_in_the_readme_names_of_files_decide(data_set, names, section, expected):
    data_set(*names, readme="# no header")
    assert read(**section) == [names[expected]]


def test_a_data_set_without_a_split_train_is_not_trained_on_another_one(data_set):
    data_set("data.jsonl", "eval.jsonl")
    with pytest.raises(DataError, match="hf:org/data: has no split train: name one of test as `split`"):
        read()
    assert read(split="test") == ["eval.jsonl"]


def test_several_kinds_of_files_are_not_guessed_from(data_set):
    data_set("train.jsonl", "train.csv")
    with pytest.raises(DataError, match=r"several kinds of files .* hf://datasets/org/data/\*\*/\*\.csv"):
        read(split="train")


def test_what_is_not_in_the_cache_names_the_command(data_set, tmp_path):
    with pytest.raises(DataError) as error:
        read("hf:org/other@v1", split="train")
    assert "`hf download org/other --repo-type dataset --revision v1`" in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_split_and_config_are_for_the_hub_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="`config` and `split` are for data sets on the hub"):
        read(str(tmp_path / "a.jsonl"), split="train")


def test_a_name_without_an_owner_is_the_hubs_to_complete(data_set, monkeypatch):
    data_set("train.jsonl", "dataset_infos.json")
    with pytest.raises(
        DataError, match=r"data: the hub did not say whose dataset .* owner/data; the cache has org/data"
    ):
        read("hf:data")
    known = SimpleNamespace(id="org/data")
    monkeypatch.setattr(
        "huggingface_hub.HfApi", lambda: SimpleNamespace(dataset_info=lambda name, revision=None: known)
    )
    assert with_owner("data@v1", "dataset") == "org/data@v1"
    assert with_owner("other/data", "dataset") == "other/data"
