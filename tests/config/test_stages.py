"""A file with stages: what is shared, what a stage says itself, and where it starts."""

import pytest
import yaml
from recipe_runs import prepare_stages

from jaxtrain.config import ConfigError, load_config
from jaxtrain.config.stages import load_stages


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepare_stages(tmp_path_factory.mktemp("stages"))


def test_a_stage_merges_what_is_shared_and_starts_from_the_export(place):
    sft, dpo = load_stages(place / "stages.yaml", ["dpo.train.steps=5", "log.every=2", f"run.dir={place / 'other'}"])
    assert (sft.config.train.steps, dpo.config.train.steps, dpo.config.train.batch_size) == (4, 5, 8)
    assert sft.config.log.every == dpo.config.log.every == 2
    assert dpo.config.model.path == str(place / "other" / "sft" / "export") and dpo.config.model.config is None
    assert dpo.config.model.compute_dtype == "float32" and dpo.config.run.dir == str(place / "other" / "dpo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages should be a list of mappings"),
        ({"stages": [{"recipe": "sft"}]}, "every stage needs a `name`"),
        ({"run": {}}, r"run\.dir, the folder of all stages, is missing"),
        ({"stages": [{"name": "a", "recipe": "sfr"}]}, "stage a:"),
    ],
)
def test_what_is_wrong_names_the_stage(place, tmp_path, changes, message):
    tree = yaml.safe_load((place / "stages.yaml").read_text()) | changes
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        load_stages(tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match="unknown key stages"):
        load_config(place / "stages.yaml")
