import sys

import pytest

from jaxtrain.named import did_you_mean, load_named


def test_names_of_modules_files_and_of_the_home_module(tmp_path):
    from custom_optimizers import lion

    assert load_named("custom_optimizers:lion", "key") is lion
    assert load_named("lion", "key", home="custom_optimizers") is lion
    file = tmp_path / "mine.py"
    file.write_text("def reward():\n    return 3\n")
    loaded = load_named(f"{file}:reward", "key")
    assert loaded() == 3 and loaded is load_named(f"{file}:reward", "key")
    assert sys.modules[loaded.__module__].reward is loaded  # so that it can be pickled


@pytest.mark.parametrize(
    ("name", "told"),
    [("q_porj", "; did you mean q_proj?"), ("model.norm", ""), ("up_proj", "; did you mean up_proj?")],
)
def test_the_most_similar_name_is_suggested_and_no_other(name, told):
    assert did_you_mean(name, iter(["q_proj", "k_proj", "up_proj"])) == told


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("lion", "rewards.name='lion' must be of the form package.module:name or file.py:name"),
        ("no_such_module:lion", "rewards.name: module no_such_module was not found"),
        ("custom_optimizers:loin", "rewards.name: custom_optimizers has no loin; did you mean lion"),
        ("no_such_file.py:lion", "rewards.name: file no_such_file.py was not found"),
    ],
)
def test_a_name_that_is_not_found_is_an_error_with_the_key(path, message):
    with pytest.raises(ValueError, match=message):
        load_named(path, "rewards.name")


def test_what_the_module_raises_is_raised(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('broken')\n")
    for _ in range(2):  # a module that failed is not kept
        with pytest.raises(RuntimeError, match="broken"):
            load_named(f"{file}:reward", "key")
