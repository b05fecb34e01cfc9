"""The recipe, also when it is killed and resumed."""

import json
import os
import signal
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from recipe_runs import checksums, killed_copy, logged, rl_tree

from jaxtrain.config import parse_config
from jaxtrain.recipes import rl
from jaxtrain.rl.failures import MAX_LOST_STEPS
from jaxtrain.session.export import export_run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rl")


def tree(place: Path, *, objective=None, sampling=None, **rl_section) -> dict:
    model = commands.MODEL | {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    return rl_tree(
        place,
        model={"config": model},
        data={"eval": {"path": str(place / "eval.jsonl")}},
        train={"steps": 6},
        eval={"every": 6, "generate": 4, "max_new_tokens": 8},
        rl=rl_section,
        objective=objective or {},
        sampling=sampling or {},
    )


def train(tree: dict, run: Path, **train_section) -> list[dict]:
    changed = tree | {"run": {"dir": str(run)}, "train": tree["train"] | train_section}
    assert rl.run(parse_config(changed, "test")).exit_code == 0
    return logged(run)


PPO = {"algorithm": "ppo", "iterations": 2, "minibatches": 2, "objective": {"beta": 0.1}}
DAPO = {"algorithm": "dapo", "minibatches": 2, "support": 8, "sampling": {"top_k": 5, "temperature": 0.9}}


@pytest.mark.parametrize("case", [{}, DAPO], ids=["grpo", "dapo with refills and filters"])
def test_killed_at_any_step_and_resumed_equals_uninterrupted(place, case, tmp_path):
    """The state after a kill: checkpoints up to some step, and a longer log."""
    config = tree(place, **case)
    whole = train(config, tmp_path / "whole")
    assert [line["step"] for line in whole if "loss" in line] == list(range(1, 7))
    assert len({line["reward"] for line in whole if "reward" in line}) > 1
    run = tmp_path / "killed"
    killed_copy(tmp_path / "whole", run)
    assert train(config, run) == whole
    assert checksums(run) == checksums(tmp_path / "whole")


def test_a_killed_process_is_resumed_bit_for_bit(place, tmp_path):
    """PPO takes four updates on the same samples, so most checkpoints are between two of them."""
    config = tree(place, **PPO)
    config |= {"train": {"steps": 12}, "checkpoint": {"every": 3}, "eval": {"every": 100}}
    del config["data"]["eval"]
    file, killed = tmp_path / "rl.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(config))
    whole = train(config, tmp_path / "whole")
    assert commands.interrupt(file, killed, signal.SIGKILL, lines=range(4, 9)) == -signal.SIGKILL
    assert "12" not in os.listdir(killed / "checkpoints")
    assert train(config, killed) == whole
    assert [line["step"] for line in whole] == list(range(1, 13))
    assert len({line["reward"] for line in whole if "reward" in line}) > 1
    assert checksums(killed) == checksums(tmp_path / "whole")


def test_in_phases_the_losses_are_bit_equal(place, tmp_path):
    """The optimizer waits on the host during rollouts, and the engine is freed during the updates."""
    phased = {"kind": "colocated", "memory": "phased"}
    kept, freed = (
        train(tree(place, minibatches=2, placement=placement), tmp_path / name, steps=4)
        for name, placement in (("kept", {}), ("phased", phased))
    )
    assert [line["loss"] for line in kept if "loss" in line] == [line["loss"] for line in freed if "loss" in line]
    assert checksums(tmp_path / "kept") == checksums(tmp_path / "phased")
    assert all(line["engine/memory_gib"] > 0 for line in freed if "engine/memory_gib" in line)


def test_grpo_increases_the_reward(place, tmp_path):
    config = tree(place, prompts=8, generations=8, slots=64)
    lines = train(config, tmp_path / "run", steps=20)
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    assert "eval_reward" in lines[-1]
    gap = [line["sampling/sampling_logp_difference/max"] for line in lines if "reward" in line]
    assert max(gap) < 1e-4
    export_run(tmp_path / "run", tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_lora_has_its_base_as_the_reference(place, tmp_path):
    config = tree(place, objective={"beta": 0.1, "kl_in": "loss"})
    config["model"]["lora"] = {"rank": 4}
    config["train"] = {"steps": 3}
    lines = train(config, tmp_path / "eight")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert lines[2]["kl"] > 1e-5


def test_modules_that_are_trained_in_full_have_their_initial_values_in_the_reference(place, tmp_path):
    """Also once the run is resumed; the critic has its own head in place of lm_head."""
    config = tree(place, algorithm="ppo", objective={"beta": 0.1, "kl_in": "loss", "kl": "k3"})
    config["model"]["lora"] = {"rank": 4, "targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    config["optimizer"]["learning_rate"] = 0.01
    whole = train(config, tmp_path / "first", steps=3)
    kls = [line["kl"] for line in whole if "kl" in line]
    assert kls[0] == pytest.approx(0, abs=1e-6) and kls[2] > 1e-4
    killed_copy(tmp_path / "first", tmp_path / "second", 2)
    assert train(config, tmp_path / "second", steps=3) == whole


def test_an_adapter_that_is_trained_on_is_part_of_the_reference(place, tmp_path):
    """Also once the run is resumed."""
    config = tree(place, objective={"beta": 0.1, "kl_in": "loss"}, minibatches=2)
    config["model"]["lora"] = {"rank": 4}
    config["optimizer"]["learning_rate"] = 0.3
    train(config, tmp_path / "first", steps=4)
    export_run(tmp_path / "first", tmp_path / "adapter", adapter=True)
    config["model"]["lora"] = {"path": str(tmp_path / "adapter")}
    whole = train(config, tmp_path / "second", steps=4)
    kls = [line["kl"] for line in whole if "kl" in line]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[3] > 1e-4
    killed_copy(tmp_path / "second", tmp_path / "third", 3)
    assert train(config, tmp_path / "third", steps=4) == whole


def test_an_entropy_bonus_is_in_the_loss_and_zero_above_its_target(place, tmp_path):
    """The coefficient is that of the step's samples, also in a run that is resumed between its updates."""
    numbers = {"entropy_coefficient": 5.0, "entropy_target": 100.0}
    bonus = train(tree(place, minibatches=2, objective=numbers), tmp_path / "bonus")
    plain = train(tree(place, minibatches=2), tmp_path / "plain")
    coefficient = bonus[0]["entropy_coefficient"]
    # The samples' mean of -log p is an estimate of the entropy; their tokens are few and nearly uniform.
    assert coefficient == pytest.approx(5.0 * (1 - bonus[0]["entropy"] / 100), abs=0.02)
    assert bonus[0]["loss"] == pytest.approx(plain[0]["loss"] - coefficient * bonus[0]["entropy"], abs=1e-4)
    low = numbers | {"entropy_target": 0.1}
    above = train(tree(place, minibatches=2, objective=low), tmp_path / "above", steps=2)
    losses = [[line["loss"] for line in lines[:2]] for lines in (above, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    killed_copy(tmp_path / "bonus", tmp_path / "killed", 3)
    assert train(tree(place, minibatches=2, objective=numbers), tmp_path / "killed") == bonus


def test_lora_dropout_is_refused(place, tmp_path):
    config = tree(place)
    config["model"]["lora"] = {"rank": 4, "dropout": 0.05}
    with pytest.raises(ValueError, match=r"model\.lora\.dropout=0\.05 must be 0"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rewards": []}, "samples have no reward"),
        ({"max_completion_length": 48}, "leaves no room for a prompt"),
        ({"max_completion_length": 40}, "the prompt has .* tokens"),
        ({"algorithm": "grppo"}, "did you mean grpo"),
        ({"generations": 1}, "rl.generations=1: advantages are relative"),
        (
            {"environment": {"factory": "jaxtrain.rl.tools:calculator_tools"}},
            "never writes the schemas of tools.* not see calculator",
        ),
    ],
)
def test_user_errors_have_a_message(place, changes, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        train(tree(place, **changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ("def mine(completions, **_):\n    raise RuntimeError('no judge')\n", "mine: RuntimeError: no judge"),
        ("def mine(completions, **_):\n    pass\n", "mine: TypeError: it must return a list of numbers"),
        ("def mine(completions, topic, **_):\n    return [1.0]\n", "mine: ValueError: it needs 'topic'"),
        ("from jaxtrain.rl.rewards import exact_answer as mine\n", "mine: None: no reward applies"),
    ],
)
def test_a_run_without_rewards_ends_with_their_names(place, functions, expected, tmp_path, caplog):
    (tmp_path / "rewards.py").write_text(functions)
    (tmp_path / "words.jsonl").write_text('{"prompt": "Which city?", "answer": "Paris"}\n' * 4)
    config = tree(place, rewards=[{"function": f"{tmp_path / 'rewards.py'}:mine"}])
    config["data"] = config["data"] | {"train": {"path": str(tmp_path / "words.jsonl")}}
    with pytest.raises(ValueError, match=f"{MAX_LOST_STEPS} consecutive rollouts have no usable reward: {expected}"):
        train(config, tmp_path / "run")
    assert caplog.text.count("lost the reward of 16 of 16 samples") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rewards/no_signal"] for line in lines] == [1.0] * (MAX_LOST_STEPS - 1)
    assert [line["rewards/lost"] for line in lines] == [16.0] * (MAX_LOST_STEPS - 1)


def test_a_run_of_epochs_ends_with_its_prompts(place, tmp_path):
    config = tree(place)
    config["data"] = config["data"] | {"train": {"path": str(place / "train.jsonl"), "limit": 6}}
    steps = config.pop("train")
    config["train"] = {name: value for name, value in steps.items() if name != "steps"} | {"epochs": 1}
    lines = train(config, tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2] and "eval_reward" in lines[-1]
    assert [line["epoch"] for line in lines if "loss" in line] == pytest.approx([4 / 6, 1])
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    config["train"], config["data"]["train"]["epochs"] = steps, 1
    with pytest.raises(ValueError, match=r"data.train ends after step 2, .* and train.steps="):
        train(config, tmp_path / "refused")
    config["train"], config["rl"]["algorithm"] = {"epochs": 1}, "dapo"
    del config["data"]["train"]["epochs"]
    with pytest.raises(ValueError, match=r"rl.algorithm.max_refills: dynamic sampling draws as many prompts"):
        train(config, tmp_path / "refused")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_row_without_a_prompt_is_named(place, split, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    config = tree(place)
    config["data"] = config["data"] | {split: {"path": str(tmp_path / "rows.jsonl")}}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: there is no prompt: this row has 'question', 'answer'"):
        train(config, tmp_path / "run")
