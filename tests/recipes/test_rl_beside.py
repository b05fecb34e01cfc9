"""Recipe rl on two processes that sample on other devices than they train on: between the updates, and beside them."""

from pathlib import Path

import commands
import pytest
import yaml
from campaign_runs import lost_or_repeated_prompts
from recipe_runs import killed_copy, logged, rl_tree

from jaxtrain.config import load_config
from jaxtrain.recipes.run import run
from jaxtrain.rl.trajectories import read_step, recorded_steps

STEPS = 5
DISJOINT = "rl.placement={kind: disjoint, rollout_devices: 1}"
BESIDE = [
    "rl.placement={kind: disjoint, rollout_devices: 1, staleness: 2}",
    "objective.correction={level: token, mode: truncate, cap: 2.0}",
    "rl.algorithm={name: grpo, max_refills: 1}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl-beside")
    config = rl_tree(
        folder,
        data={"eval": {"path": str(folder / "eval.jsonl")}},
        train={"steps": STEPS},
        eval={"every": 3, "generate": 4, "max_new_tokens": 4},
    )
    (folder / "rl.yaml").write_text(yaml.safe_dump(config))
    return folder


def train_on_two(place: Path, *runs: tuple[str, list[str]]) -> None:
    """Two processes with a device that trains and one that samples each."""
    calls = [["train", str(place / "rl.yaml"), f"run.dir={place / name}", *changes] for name, changes in runs]
    commands.Job(place, 2, calls, devices=4).finish()


@pytest.fixture(scope="module")
def runs(place) -> None:
    assert run(load_config(place / "rl.yaml", [f"run.dir={place / 'one'}"])).exit_code == 0
    train_on_two(place, ("disjoint", [DISJOINT]), ("beside", BESIDE))


def samples(folder: Path) -> list[tuple]:
    return [
        (step, t.prompt.number, t.sample, t.completion_ids.tolist(), t.reward)
        for step in recorded_steps(folder)
        for t in read_step(folder, step)
    ]


def test_sampling_on_other_devices_equals_sampling_on_those_that_train(place, runs):
    assert samples(place / "disjoint") == samples(place / "one")
    for line, expected in zip(logged(place / "disjoint"), logged(place / "one"), strict=True):
        for name in line.keys() & {"loss", "grad_norm", "entropy", "reward", "eval_reward"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_run_that_samples_beside_training_trains_all_its_steps_on_older_weights(place, runs):
    lines = [line for line in logged(place / "beside") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert 0 < max(line["staleness/max"] for line in lines) <= 2
    assert len({sample[4] for sample in samples(place / "beside")}) > 1


def test_no_prompt_is_lost_or_repeated(place, runs):
    assert lost_or_repeated_prompts(place / "beside") == []


def test_a_killed_run_draws_the_prompts_that_were_not_used_before_its_checkpoint(place, runs):
    killed_copy(place / "beside", place / "killed", 2)
    train_on_two(place, ("killed", BESIDE))
    before = [entry for entry in samples(place / "beside") if entry[0] <= 2]
    assert samples(place / "killed")[: len(before)] == before
    assert lost_or_repeated_prompts(place / "killed") == []


def test_held_out_prompts_are_evaluated_between_the_rollouts(place, runs):
    for name in ("disjoint", "beside"):
        assert sum("eval_reward" in line for line in logged(place / name)) == 2
