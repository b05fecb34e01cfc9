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


def test_an_override_of_the_checkpoint_is_of_the_first_stage(place):
    """The others start from exports: `model.path` on the command line does not take them back to it."""
    origin = ["model.path=base", "model.config=null", "model.add_tokens.names=[<a>]", "model.chat_template=t.jinja"]
    sft, dpo = load_stages(place / "stages.yaml", [*origin, "model.lora.path=adapter"])
    assert (sft.config.model.path, sft.config.model.lora.path) == ("base", "adapter")
    assert dpo.config.model.path == str(sft.export) and dpo.config.model.lora is None
    assert dpo.config.model.add_tokens is None and dpo.config.model.chat_template is None
    _, own = load_stages(place / "stages.yaml", [*origin, "dpo.model.path=other"])
    assert own.config.model.path == "other"


def stages_of(place, tmp_path, *recipes, model=None, last=None):
    tree = yaml.safe_load((place / "stages.yaml").read_text())
    sft = tree["stages"][0]
    tree["model"] |= model or {}
    tree["stages"] = [{**sft, "name": f"{recipe}_{n}", "recipe": recipe} for n, recipe in enumerate(recipes)]
    tree["stages"][-1] |= last or {}
    (tmp_path / "stages.yaml").write_text(yaml.safe_dump(tree))
    return load_stages(tmp_path / "stages.yaml")


def test_a_reward_model_is_not_trained_as_a_language_model(place, tmp_path):
    with pytest.raises(ConfigError, match=r"stage sft_2: stage reward_1 exports a reward model, .*sft_0/export"):
        stages_of(place, tmp_path, "sft", "reward", "sft")
    own = {"model": {"path": str(place / "pipeline" / "sft_0" / "export")}}
    assert len(stages_of(place, tmp_path, "sft", "reward", "sft", last=own)) == 3


def test_an_adapter_is_not_added_twice(place, tmp_path):
    shared = {"lora": {"path": "adapter"}}
    with pytest.raises(ConfigError, match=r"model\.lora\.path would be added to the export of stage sft_0"):
        stages_of(place, tmp_path, "sft", "sft", model=shared)
    assert len(stages_of(place, tmp_path, "sft", "sft", model=shared, last={"model": {"lora": {"rank": 4}}})) == 2
