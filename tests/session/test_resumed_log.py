"""A run that ends at an unfortunate moment and is resumed logs, evaluates and calls back as one that does not."""

import itertools
import signal

import pytest
import tiny
from campaign_runs import scalars
from recipe_runs import logged

from jaxtrain.config import parse_config
from jaxtrain.objectives.sft import SFT
from jaxtrain.session.session import Session

BATCH = tiny.packed_batch([[9, 20, 3], [14, 14]] * 4, 32)


class Killed(Exception):
    pass


class NoState:
    """Batches without a state."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def train(run, ends=(), log_every=1, **sections) -> list[int]:
    """Train for four steps. `ends`: at which of the run's actions, "evaluation 4" for example, each start of it is
    killed, or stopped by a signal ("SIGUSR1: evaluation 4"); one more start comes to the end. Returns the steps of the
    callbacks."""
    tree = {
        "recipe": "sft",
        "run": {"dir": str(run)},
        "model": {"config": tiny.HF_CONFIG, "compute_dtype": "float32"},
        "data": {"train": {"path": str(run.parent / "train.jsonl"), "epochs": 1}, "max_length": 32},
        "train": {"steps": 4},
        "log": {"every": log_every, "to": ["tensorboard"]},
        "checkpoint": {"every": 2},
        "eval": {"every": 3},
    }
    config, called = parse_config(tree | sections, "test"), []
    for end in [*ends, ""]:
        try:
            _start(config, end, called)
        except Killed:
            continue
    return called


def _start(config, end, called):
    def reach(action):
        if end == f"SIGUSR1: {action}":
            signal.raise_signal(signal.SIGUSR1)
            session.check()
        if end == action:
            raise Killed

    def evaluate():
        reach(f"evaluation {session.step}")
        return {"score": 1 / session.step}

    def call(session):
        reach(f"callback {session.step}")
        called.append(session.step)

    with Session.open(config) as session:
        policy = session.trained_role("policy", SFT())
        session.evaluator("score", evaluate)
        session.every(3, call)
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(BATCH)):
            session.report(policy=policy.update(batch))
            reach(f"step {session.step + 1}")


@pytest.mark.parametrize(
    "ends",
    [
        ["evaluation 4"],
        ["callback 4"],
        ["SIGUSR1: evaluation 4"],
        ["SIGUSR1: evaluation 4", "callback 4"],
        ["SIGUSR1: evaluation 3", "step 4"],
        ["SIGUSR1: evaluation 3", "callback 3", "evaluation 4"],
    ],
    ids=", ".join,
)
def test_nothing_is_lost_or_logged_twice(tmp_path, ends):
    assert train(tmp_path / "whole") == [3, 4]
    called = train(tmp_path / "resumed", ends)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    assert scalars(tmp_path / "resumed") == scalars(tmp_path / "whole")
    assert sorted(set(called)) == [3, 4]


def test_a_run_that_goes_on_from_its_best_step_knows_the_steps_before(tmp_path):
    """The best step is saved although no report is due after it."""
    best = {"log_every": 4, "eval": {"every": 3, "best": {"metric": "score", "mode": "max"}}}
    best["checkpoint"] = {"every": 100}
    train(tmp_path / "whole", **best)
    train(tmp_path / "resumed", ["step 4"], **best)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole")
    assert [line["num_tokens"] for line in logged(tmp_path / "whole") if "loss" in line][-1] > 0


def test_a_complete_run_evaluates_nothing_again(tmp_path, capsys):
    train(tmp_path / "run")
    assert train(tmp_path / "run") == []
    assert "is finished" in capsys.readouterr().out
