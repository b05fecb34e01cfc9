"""Recipe rl on two and four processes: as on one, with an engine for each or for two, resumed on as many or others."""

import importlib.util
import os
from pathlib import Path

import commands
import jax
import pytest
import ray_start
import yaml
from recipe_runs import checksums, killed_copy, logged, rl_tree

from jaxtrain.config import load_config
from jaxtrain.recipes.run import run
from jaxtrain.rl.placement import check_processes
from jaxtrain.rl.trajectories import TRAJECTORIES, read_step, recorded_steps

LORA = "model.lora={rank: 4}"
CASES = {  # overrides; each takes several updates on the same samples
    "grpo": [LORA, "rl.minibatches=2", "objective.beta=0.1"],
    "ppo": ["rl.algorithm=ppo", "rl.iterations=2", "rl.minibatches=2", "objective.beta=0.1"],
    "dapo": [
        "rl.algorithm={name: dapo, overlong_filter: false}",
        "rl.minibatches=2",
        "rl.support=8",
        "sampling.top_k=5",
        "sampling.temperature=0.9",
    ],
    "environment": [
        f"rl.environment={{factory: '{Path(__file__).parent / 'digits.py'}:MoreDigits', max_turns: 2}}",
        "rl.rewards=[]",
        "rl.max_completion_length=24",
        "data.max_length=160",
        "model.config.max_position_embeddings=160",
        f"model.config.eos_token_id={list(range(65, 72))}",  # a turn must end for the environment to be asked
        "train.steps=2",
    ],
}
RESUMED_AFTER = {"ppo": 3, "dapo": 2}  # steps, in the middle of updates and between rollouts
ONE_ENGINE = "rl.placement.processes_per_engine=2"
SHARED = ("grpo", "environment")  # with an engine of two processes as well


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rl-processes")
    (folder / "rl.yaml").write_text(yaml.safe_dump(rl_tree(folder)))
    return folder


def overrides(place: Path, case: str, name: str) -> list[str]:
    evaluation = f"data.eval={{path: {place / 'eval.jsonl'}}}"
    judged = [evaluation, "eval={every: 4, generate: 3, max_new_tokens: 8}"] if case == "ppo" else []
    return [f"run.dir={place / case / name}", *CASES[case], *judged]


def train(place: Path, case: str, name: str) -> None:
    assert run(load_config(place / "rl.yaml", overrides(place, case, name))).exit_code == 0


@pytest.fixture(scope="module")
def one(place) -> None:
    """The runs of one process."""
    for case in CASES:
        train(place, case, "one")


@pytest.fixture(scope="module")
def two(place, one) -> None:
    """The runs of two processes, whole and from the middle of the updates of one process."""
    killed_copy(place / "ppo" / "one", place / "ppo" / "on", 1)
    runs = [*((case, "two") for case in CASES), *((case, "one engine") for case in SHARED), ("ppo", "on")]
    calls = [
        ["train", str(place / "rl.yaml"), *overrides(place, *each), *([ONE_ENGINE] if each[1] == "one engine" else [])]
        for each in runs
    ]
    commands.Job(place, 2, calls, devices=2).finish()


@pytest.fixture(scope="module")
def resumed(place, two) -> None:
    """On two processes, what a kill has left of runs of two: in the middle of updates, or between rollouts."""
    for case, step in RESUMED_AFTER.items():
        killed_copy(place / case / "two", place / case / "killed", step)
    calls = [["train", str(place / "rl.yaml"), *overrides(place, case, "killed")] for case in RESUMED_AFTER]
    commands.Job(place, 2, calls, devices=2).finish()


@pytest.fixture(scope="module")
def four(place, one) -> None:
    """On four processes, from the middle of the updates of one process: the other updates, and another rollout."""
    killed_copy(place / "grpo" / "one", place / "grpo" / "four", 1)
    command = ["train", str(place / "rl.yaml"), *overrides(place, "grpo", "four")]
    commands.Job(place, 4, [command], devices=4).finish()


def samples(run: Path) -> list[tuple]:
    """Of each sample: where it belongs, and its tokens."""
    return [
        (step, t.prompt.number, t.sample, t.completion_ids.tolist(), str(t.reward), t.left_out)  # it may be NaN
        for step in recorded_steps(run)
        for t in read_step(run, step)
    ]


def names(line: dict) -> list[str]:
    """Of its metrics, without the counts of lost workers, which only Ray has."""
    return sorted(name for name in line if not name.startswith("rollout/"))


def assert_equal(run: Path, other: Path) -> None:
    """The same samples, and numbers as nearly as float32 has them."""
    assert samples(run) == samples(other)
    lines, expected = logged(run), logged(other)
    assert [names(line) for line in lines] == [names(line) for line in expected]
    for line, there in zip(lines, expected, strict=True):
        for name in line.keys() & {"step", "num_tokens", "epoch", "reward", "reward_std", "completions/mean_length"}:
            assert line[name] == pytest.approx(there[name], rel=1e-9), name
        for name in line.keys() & {"loss", "grad_norm", "kl", "entropy", "critic/loss", "eval_reward"}:
            assert line[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(place, two, case):
    assert_equal(place / case / "two", place / case / "one")
    names = {path.name for path in (place / case / "two" / TRAJECTORIES).iterdir()}
    assert {"step_00000001.0-of-2.parquet", "step_00000001.1-of-2.parquet"} <= names


@pytest.mark.parametrize("case", SHARED)
def test_an_engine_of_two_processes_equals_one_of_each(place, two, case):
    assert_equal(place / case / "one engine", place / case / "two")


def test_environments_of_two_processes_have_responded(place, two):
    """Else the tests above would not test conversations."""
    talks = [
        t
        for step in recorded_steps(place / "environment" / "two")
        for t in read_step(place / "environment" / "two", step)
    ]
    assert {t.info["turns"] for t in talks} == {1, 2} and not all(t.loss_mask.all() for t in talks)
    assert {bool(t.info.get("error")) for t in talks} == {True, False}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.skipif("JAXTRAIN_RAY_JOBS" not in os.environ, reason="takes minutes: set JAXTRAIN_RAY_JOBS=1")
def test_ray_workers_of_two_processes_equal_one_process(place, one, tmp_path):
    ray = "rl.placement={kind: ray, workers: 2}"
    call = ["train", str(place / "rl.yaml"), *overrides(place, "grpo", "ray"), ray]
    with ray_start.shared(tmp_path):
        commands.Job(place, 2, [call], devices=2).finish()
    assert_equal(place / "grpo" / "ray", place / "grpo" / "one")
    lines = logged(place / "grpo" / "ray")
    assert sum(line.get("rollout/lost_workers", 0) + line.get("rollout/slow_workers", 0) for line in lines) == 0
    assert any("rollout/lost_workers" in line for line in lines)


def test_workers_that_cannot_be_divided_among_the_processes_are_refused(place, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    section = load_config(place / "rl.yaml", ["rl.placement={kind: ray, workers: 3}"]).rl
    assert section is not None
    with pytest.raises(ValueError, match="workers=3 must be a multiple of the 2 processes"):
        check_processes(section)


@pytest.mark.parametrize("case", RESUMED_AFTER)
def test_a_killed_job_goes_on_exactly(place, resumed, case):
    assert logged(place / case / "killed") == logged(place / case / "two")
    assert checksums(place / case / "killed") == checksums(place / case / "two")
    assert samples(place / case / "killed") == samples(place / case / "two")


def test_the_updates_of_one_process_go_on_on_two_and_back(place, two):
    assert_equal(place / "ppo" / "on", place / "ppo" / "one")
    killed_copy(place / "ppo" / "two", place / "ppo" / "back", 1)
    train(place, "ppo", "back")
    assert_equal(place / "ppo" / "back", place / "ppo" / "one")


def test_the_updates_of_one_process_go_on_on_four(place, four):
    assert_equal(place / "grpo" / "four", place / "grpo" / "one")
    names = {path.name for path in (place / "grpo" / "four" / TRAJECTORIES).iterdir()}
    assert names == {"step_00000001.parquet", *(f"step_00000003.{rank}-of-4.parquet" for rank in range(4))}


def test_the_samples_have_different_rewards(place, one):
    """Else the tests above would see nothing of rewards and advantages."""
    for case in CASES:
        assert len({sample[4] for sample in samples(place / case / "one")}) > 1
        assert any(line.get("grad_norm", 0) > 1e-3 for line in logged(place / case / "one")), case
