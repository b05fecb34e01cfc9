"""The driver: restarts by exit code, and two real workers of Ray's JaxTrainer on CPUs."""

import json
import logging
import os

import commands
import pytest
import ray_start
import yaml

from converters.tokenizer import write_byte_tokenizer
from jaxtrain.launch import ray_driver
from jaxtrain.launch.ray_driver import RayTask, train_on_ray


def task(config: str = "sft.yaml", nodes: int = 2) -> RayTask:
    return RayTask(config=config, overrides=[], nodes=nodes, retries=2, name="tiny", resources_per_worker={})


@pytest.mark.parametrize(
    ("codes", "code", "attempts"), [([0], 0, 1), ([1, 137, 0], 0, 3), ([1, 1, 1, 0], 1, 3), ([2, 0], 2, 1)]
)
def test_failures_are_restarted_and_errors_of_the_users_are_not(monkeypatch, codes, code, attempts):
    left = list(codes)
    monkeypatch.setattr(ray_driver, "_attempt", lambda task: left.pop(0))
    assert train_on_ray(task()) == code
    assert len(codes) - len(left) == attempts


class Wrapped(Exception):
    """As Ray wraps what a worker raised."""

    def __init__(self, cause: BaseException) -> None:
        self._base_exc = cause


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({0: Wrapped(RuntimeError("lost")), 1: Wrapped(ValueError("unknown key"))}, 2),
        ({1: Wrapped(FileNotFoundError("train.jsonl"))}, 2),
        ({0: RuntimeError("the actor died")}, 1),
    ],
)
def test_the_exit_code_is_that_of_the_command(failures, code):
    assert ray_driver._exit_code(failures) == code


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    if "JAXTRAIN_RAY_JOBS" not in os.environ:
        pytest.skip("takes a minute and more: set JAXTRAIN_RAY_JOBS=1")
    pytest.importorskip("pandas", reason="ray.train needs it: pip install 'ray[train]'")
    folder = tmp_path_factory.mktemp("ray")
    ray_start.start(folder)
    write_byte_tokenizer(folder / "tokenizer")
    rows = [{"prompt": f"What is {n}?", "completion": "x" * (n % 7 + 1)} for n in range(32)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "recipe": "sft",
        "run": {"dir": str(folder / "run")},
        "model": {"config": commands.MODEL, "tokenizer": str(folder / "tokenizer"), "compute_dtype": "float32"},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "max_length": 64, "packing": False},
        "train": {"batch_size": 16, "steps": 2},
        "log": {"every": 1, "to": []},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_two_workers_of_jax_trainer_train_one_run(place, caplog):
    """JaxTrainer has called `jax.distributed.initialize`, and calls ours in a thread."""
    caplog.set_level(logging.INFO)
    assert train_on_ray(task(str(place / "sft.yaml"))) == 0, caplog.text
    logged = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2]
    assert logged[-1]["data/examples"] == 32  # 16 of each step over both


def test_an_error_of_a_workers_config_is_not_tried_again(place, caplog):
    assert train_on_ray(task(str(place / "other.yaml"), nodes=1)) == 2
    assert "no config file" in caplog.text and "restart" not in caplog.text
