"""What a replay refuses, before it trains. That it repeats a run's losses is in test_rl_worlds.py."""

import pytest

from jaxtrain.config import dump_config, parse_config
from jaxtrain.recipes.replay import replay
from jaxtrain.session.record import CONFIG

RL = {"rewards": [{"function": "my_rewards.py:r"}], "max_completion_length": 8}


def folder_of(path, **changes):
    tree = {
        "recipe": "rl",
        "run": {"dir": str(path)},
        "model": {"path": "base"},
        "data": {"train": {"path": "a.jsonl"}, "max_length": 32},
        "train": {"steps": 1},
        "rl": RL,
    }
    path.mkdir()
    (path / CONFIG).write_text(dump_config(parse_config({**tree, **changes}, "test")))
    return path


def test_a_replay_needs_a_folder_of_its_own(tmp_path):
    run = folder_of(tmp_path / "run")
    with pytest.raises(ValueError, match="a replay must not write to the folder of the run that it replays"):
        replay(run, tmp_path / "x" / ".." / "run")


def test_only_reinforcement_learning_records_samples(tmp_path):
    run = folder_of(tmp_path / "run", recipe="sft", rl=None)
    with pytest.raises(ValueError, match="is a run of recipe sft, which records no samples"):
        replay(run, tmp_path / "out")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        replay(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_override_that_is_no_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\.stepz"):
        replay(folder_of(tmp_path / "run"), tmp_path / "out", ["train.stepz=1"])
