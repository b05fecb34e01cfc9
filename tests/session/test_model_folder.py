"""What is understood as a model: a run, an adapter, a folder of the hub's cache."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import recipe_runs

from converters.import_hf import import_params, read_config
from converters.weight_rows import flatten
from jaxtrain.config import load_config
from jaxtrain.hub import HubError
from jaxtrain.nn.model import Model
from jaxtrain.recipes.run import run
from jaxtrain.session.export import export_run
from jaxtrain.session.model_folder import model_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base model and a run of adapters on it."""
    place = recipe_runs.prepare(tmp_path_factory.mktemp("models"), "sft")
    few = ["train.steps=1", "checkpoint.every=1", "eval.every=9"]
    run(load_config(place / "run.yaml", [*few, f"run.dir={place / 'first'}"]))
    export_run(place / "first", place / "base")
    given = [f"model.path={place / 'base'}", "model.config=null", "model.lora={rank: 2}", f"run.dir={place / 'lora'}"]
    run(load_config(place / "run.yaml", [*few, *given]))
    return place


def weights(folder) -> dict[str, np.ndarray]:
    config, _ = read_config(folder)
    return {
        name: np.asarray(leaf)
        for name, leaf in flatten(import_params(folder, config, Model(config).abstract())).items()
    }


def test_a_run_is_its_newest_checkpoint_and_an_adapter_is_merged_with_its_base(place):
    export_run(place / "lora", place / "merged")
    export_run(place / "lora", place / "adapter", adapter=True)
    expected, base = weights(place / "merged"), weights(place / "base")
    assert any((expected[name] != base[name]).any() for name in base)
    for given in ("lora", "adapter"):
        found = model_folder(str(place / given))
        assert Path(found).name == given
        for name, leaf in weights(found).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=f"{given}: {name}")
    assert model_folder(str(place / "base")) == str(place / "base")
    files = fsspec.filesystem("memory")
    for given in ("lora", "adapter", "base"):
        files.put(str(place / given), f"/models/{given}", recursive=True)
    for given in ("lora", "adapter"):
        found = weights(model_folder(f"memory://models/{given}"))
        assert all((found[name] == leaf).all() for name, leaf in expected.items()), given
    assert model_folder("memory://models/base") == "memory://models/base"


def test_a_folder_of_the_hubs_cache_is_its_main_snapshot(place, tmp_path):
    cache = tmp_path / "models--owner--name"
    for commit in ("abc", "def"):
        shutil.copytree(place / "base", cache / "snapshots" / commit)
    with pytest.raises(ValueError, match=r"several snapshots: name one, such as .*abc"):
        model_folder(str(cache))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def")
    assert model_folder(str(cache)) == str(cache / "snapshots" / "def")


def test_anything_else_is_an_error_that_names_what_is_there(place, tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json. Did you mean one of .*base.*lora"):
        model_folder(str(place))
    with pytest.raises(ValueError, match="Give a Hugging Face folder, a run, or an adapter"):
        model_folder(str(tmp_path))
    shutil.copy(place / "lora" / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="a run without a checkpoint yet"):
        model_folder(str(tmp_path))
    with pytest.raises(HubError, match="the model of that name is not in the cache"):
        model_folder("owner/name")
