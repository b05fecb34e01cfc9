"""The keys of a config, their types, defaults and meanings."""

import json

from typer.testing import CliRunner

from jaxtrain.cli import app
from jaxtrain.config import RunConfig, known_keys
from jaxtrain.config.keys import ConfigKey
from jaxtrain.config.sections import TrainSection

KEYS = dict(known_keys())


def test_keys_are_those_of_all_sections():
    assert "run.seed" in KEYS and "rl.rewards.function" in KEYS and "objective.beta" in KEYS
    assert all(key.rpartition(".")[0] in KEYS for key in KEYS if "." in key)  # a section is a key, too


def test_every_key_of_a_section_of_the_config_has_a_description():
    of_dataclasses = ("objective.", "rl.algorithm.")  # whose classes describe their fields
    assert [name for name, key in KEYS.items() if not key.text and not name.startswith(of_dataclasses)] == []


def test_types_and_defaults_are_written_as_in_yaml():
    assert (KEYS["train.steps"].kind_text, KEYS["train.steps"].default_text) == ("integer | null", "null")
    assert (KEYS["data.shuffle"].kind_text, KEYS["data.shuffle"].default_text) == ("true | false | blocks", "true")
    assert KEYS["data.train"].kind_text == "section | list of section"
    assert KEYS["model.lora.targets"].kind_text == "list of text | null"
    assert (KEYS["sampling.stop"].kind_text, KEYS["sampling.stop"].default_text) == ("list of text", "[]")
    assert ConfigKey(TrainSection, TrainSection(), "").default_text == ""


def test_the_command_shows_a_section_and_the_schema():
    shown = CliRunner().invoke(app, ["config", "train"]).output
    assert shown.startswith("train: section\n") and "train.steps: integer | null = null\n    Optimizer steps." in shown
    assert "optimizer" not in shown
    schema = json.loads(CliRunner().invoke(app, ["config", "--schema"]).output)
    assert schema["$defs"] == RunConfig.model_json_schema()["$defs"]
    # A file may extend another, which has the rest, or be one of several stages.
    assert {"extends", "stages", "train"} <= schema["properties"].keys() and "required" not in schema
    unknown = CliRunner().invoke(app, ["config", "train.step"]).exception
    assert str(unknown) == "a config has no key train.step; did you mean train.steps?"
