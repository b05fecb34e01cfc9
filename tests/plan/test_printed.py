"""The command prints the estimate first; as JSON it prints nothing else."""

import json

import pytest
import recipe_runs
from typer.testing import CliRunner

from jaxtrain import cli
from jaxtrain.config import load_config
from jaxtrain.plan import search as module
from jaxtrain.plan.printed import print_plan, print_search


@pytest.fixture
def config(tmp_path):
    return load_config(recipe_runs.prepare(tmp_path, "sft") / "run.yaml")


def test_the_estimate_comes_first(config, capsys, monkeypatch):
    def stop(*given):
        raise ValueError("before compilation")

    monkeypatch.setattr("jaxtrain.plan.planner.compile_program", stop)
    with pytest.raises(ValueError, match="before compilation"):
        print_plan(config, "cpu:8")
    assert "estimate, before compilation:" in capsys.readouterr().out


def test_json_is_all_that_is_printed(config, capsys):
    print_plan(config, "v5p:2x2x2", as_json=True, compiled=False)
    made = json.loads(capsys.readouterr().out)
    assert made["chips"] == 8
    assert made["parameters"] > 0


def test_a_search_prints_each_plan_and_the_yaml(config, capsys, monkeypatch):
    monkeypatch.setattr(module, "plan", lambda config, on, **given: module_plan(config, on))
    print_search(config, "v5p:2x2x2")
    assert "mesh:\n  preset:" in capsys.readouterr().out
    print_search(config, "v5p:2x2x2", as_json=True)
    assert json.loads(capsys.readouterr().out)["values"]["mesh.tensor"] == 1


def module_plan(config, on):
    from jaxtrain.plan.planner import plan

    return plan(config, on, compiled=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "give the devices to plan for"), (["--on", "cpu:8", "--search", "--estimate"], "neither with --estimate")],
)
def test_options_that_do_not_go_together_are_errors(tmp_path, options, words, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = CliRunner().invoke(cli.app, ["plan", str(recipe_runs.prepare(tmp_path, "sft") / "run.yaml"), *options])
    assert isinstance(done.exception, ValueError)
    assert words in str(done.exception)
