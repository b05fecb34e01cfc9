"""Preference, reward and distillation on two processes: as on one, and killed and resumed on as many or others."""

from pathlib import Path

import commands
import numpy as np
import pyarrow.parquet as pq
import pytest
from recipe_runs import checksums, killed_copy, logged, losses, prepare, train

SPARSE = "checkpoint.every=3"
CASES = {  # the recipe, and what differs from its config; each has one program less than all would have
    "dpo": ("preference", ["data.eval=null", SPARSE]),
    # Labels of 42 answers, two of which are left for the last batch: one process has none of them.
    "kto": (
        "preference",
        [
            *("objective=KTO", "data.packing=false", "data.train.limit=21", "data.eval=null"),
            *("train.steps=null", "train.epochs=1", SPARSE),
        ],
    ),
    # A larger eps than the default: Adam makes whole updates of gradients that are zero but for rounding.
    "reward": ("reward", [SPARSE, "optimizer.eps=1e-3"]),
    "distill": ("distill", ["eval.every=6", SPARSE]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    for name, (recipe, _) in CASES.items():
        prepare(folder / name, recipe)
    return folder


def overrides(place: Path, case: str, processes: str) -> list[str]:
    """DPO has a reference whose log-probabilities are cached; that of KTO runs in every step."""
    cache = [f"reference.cache={place / 'dpo' / f'cache of {processes}'}"] if case == "dpo" else []
    return [*CASES[case][1], *cache]


def command(place: Path, case: str, name: str, *more: str) -> list[str]:
    file, folder = place / case / "run.yaml", place / case / name
    return ["train", str(file), f"run.dir={folder}", *overrides(place, case, "two"), *more]


@pytest.fixture(scope="module")
def one(place):
    """The runs of one process."""
    for case in CASES:
        train(place / case, "one", *overrides(place, case, "one"))


@pytest.fixture(scope="module")
def two(place) -> None:
    """The runs of two processes."""
    commands.Job(place, 2, [command(place, case, "two") for case in CASES], devices=2).finish()


@pytest.fixture(scope="module")
def resumed(place, one, two) -> list[str]:
    """On two processes: `killed`, what a kill has left of a run of two processes, and `on`, of a run of one. Returns
    what is printed of a run that is refused."""
    for case in CASES:
        killed_copy(place / case / "two", place / case / "killed")
    runs = [(case, "killed") for case in CASES]
    killed_copy(place / "kto" / "one", place / "kto" / "on")
    runs.append(("kto", "on"))
    runs.append(("kto", "refused", "reference.devices=1"))
    return commands.Job(place, 2, [command(place, *run) for run in runs], devices=2).finish(2)[-1]


def assert_equal(run: Path, other: Path) -> None:
    """Batches are the same, and numbers as nearly as float32 has them."""
    lines, expected = logged(run), logged(other)
    for name in ("step", "num_tokens", "epoch", "learning_rate", "data/examples"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in expected], name
    for name in ("loss", "grad_norm", "eval_loss", "eval_calibration_error"):
        np.testing.assert_allclose(losses(lines, name), losses(expected, name), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(place, one, two, case):
    assert_equal(place / case / "two", place / case / "one")


@pytest.mark.parametrize("case", CASES)
def test_a_job_goes_on_exactly_from_any_checkpoint(place, resumed, case):
    assert logged(place / case / "killed") == logged(place / case / "two")
    assert checksums(place / case / "killed") == checksums(place / case / "two")


def test_a_checkpoint_of_one_process_goes_on_on_two_and_back(place, resumed):
    assert_equal(place / "kto" / "on", place / "kto" / "one")
    for case in ("dpo", "reward"):
        killed_copy(place / case / "two", place / case / "back")
        train(place / case, "back", *overrides(place, case, "one"))
        assert_equal(place / case / "back", place / case / "one")


def test_two_processes_compute_a_cache_as_one(place, one, two):
    for file in sorted((place / "dpo" / "cache of one").iterdir()):
        ours, others = pq.read_table(file), pq.read_table(place / "dpo" / "cache of two" / file.name)
        assert ours.column_names == others.column_names
        for name in ours.column_names:
            here, there = (np.concatenate(table[name].to_pylist()) for table in (ours, others))
            np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_devices_of_a_reference_are_refused_on_several_processes(resumed):
    assert all("reference.devices needs a single process" in printed for printed in resumed)
