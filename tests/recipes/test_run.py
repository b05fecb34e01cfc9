"""A run is done by the recipe that its config names, with what it was given."""

from types import SimpleNamespace

import pytest
import yaml

from jaxtrain.recipes import rl, sft, stages
from jaxtrain.recipes.run import run, run_file


@pytest.mark.parametrize(("name", "recipe"), [("sft", sft), ("rl", rl)])
def test_the_recipe_gets_every_argument(monkeypatch, name, recipe):
    calls = []
    monkeypatch.setattr(recipe, "run", lambda config, **options: calls.append((config, options)) or "outcome")
    config, options = SimpleNamespace(recipe=name), {"resume": False, "allow_change": ["a"], "preemption": object()}
    assert run(config, **options) == "outcome"
    assert calls == [(config, options)]


@pytest.mark.parametrize("staged", [False, True])
def test_a_file_is_a_run_or_stages(monkeypatch, tmp_path, staged):
    parts = {"recipe": "sft", "data": {"train": {"path": "a.jsonl"}, "max_length": 8}}
    tree = {"model": {"path": "model"}, "run": {"dir": "runs/x"}}
    tree |= {"stages": [{"name": "one", **parts, "train": {"steps": 1}}]} if staged else parts | {"train": {"steps": 1}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    calls = []
    monkeypatch.setattr(sft, "run", lambda config, **_: calls.append(config) or SimpleNamespace(exit_code=7))
    monkeypatch.setattr(stages, "run_stages", lambda found, **_: calls.extend(each.config for each in found) or 7)
    assert run_file(path, ["train.steps=3"]) == 7
    assert [config.train.steps for config in calls] == [3]
