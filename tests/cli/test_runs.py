"""Commands on runs and their configs."""

import yaml
from typer.testing import CliRunner

from jaxtrain.cli import app
from jaxtrain.config import load_config

TREE = {
    "recipe": "sft",
    "run": {"dir": "runs/x"},
    "model": {"path": "model"},
    "data": {"train": {"path": "a.jsonl"}},
    "train": {"steps": 3},
}


def test_the_printed_config_is_the_resolved_one(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(TREE))
    printed = CliRunner().invoke(app, ["train", str(file), "train.steps=5", "--print-config"]).output
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == load_config(file, ["train.steps=5"])
    assert yaml.safe_load(printed)["train"]["max_grad_norm"] == 1.0  # a default


def test_the_configs_of_all_stages_are_printed(tmp_path):
    file = tmp_path / "stages.yaml"
    stages = [{"name": "first", "recipe": "sft"}, {"name": "second", "recipe": "sft", "train": {"steps": 4}}]
    file.write_text(yaml.safe_dump({key: TREE[key] for key in TREE if key != "recipe"} | {"stages": stages}))
    printed = CliRunner().invoke(app, ["train", str(file), "--print-config"]).output
    assert [tree["train"]["steps"] for tree in yaml.safe_load_all(printed)] == [3, 4]


def test_the_quickstart_takes_overrides_without_a_config(monkeypatch):
    taken = []
    monkeypatch.setattr("jaxtrain.recipes.quickstart.run", lambda config: taken.append(config) or 0)
    assert CliRunner().invoke(app, ["quickstart", "train.steps=50", "run.seed=3"]).exit_code == 0
    assert (taken[0].train.steps, taken[0].run.seed) == (50, 3)
