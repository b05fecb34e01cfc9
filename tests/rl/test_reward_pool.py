import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.config.rl_parts import RewardSection
from jaxtrain.rl.reward_pool import RewardPool
from jaxtrain.train.preemption import Interrupted

HERE = Path(__file__).parent / "reward_functions.py"
WELL = ["length", "length_later", "only_even", "no_jax", "noisy"]
BAD = {
    "raises": "error",
    "hangs": "timeout",
    "dies": "died",
    "not_a_number": "not_finite",
    "one_too_many": "wrong_length",
}
TEXTS = ["a", "bb", "bad", "cccc", "ddddd"]


def section(name, **changes):
    return RewardSection(function=f"{HERE}:{name}", **{"seconds": 2.0, **changes})


def score(pool, texts=TEXTS):
    return pool.score(["?"] * len(texts), texts, [[0] * len(text) for text in texts], {"answer": range(len(texts))})


def test_parts_are_what_the_functions_say():
    with RewardPool([*map(section, WELL), section("columns", args={"bonus": 100.0})]) as pool:
        scores = score(pool)
    lengths = np.array([1, 2, 3, 4, 5.0])
    np.testing.assert_array_equal(scores.parts["length"], lengths)
    np.testing.assert_array_equal(scores.parts["length_later"], lengths)
    np.testing.assert_array_equal(scores.parts["only_even"], [np.nan, 1, np.nan, 1, np.nan])
    np.testing.assert_array_equal(scores.parts["no_jax"], np.ones(5))
    np.testing.assert_array_equal(scores.parts["columns"], 1 + lengths + np.arange(5) + 100)
    assert not scores.failures and not scores.reasons


def test_workers_survive_the_signals_that_slurm_sends_to_every_process_of_a_job():
    with RewardPool([section("length")]) as pool:
        score(pool)
        for worker in pool._workers:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(worker._process.pid, number)
        assert not score(pool).failures


def test_every_kind_of_failure_loses_only_its_sample():
    with RewardPool([section(name, seconds=0.4) for name in BAD]) as pool:
        for _ in range(2):  # replaced workers work
            scores = score(pool)
            assert scores.failures == dict.fromkeys(BAD.items(), 1)
            assert list(scores.reasons) == [2]
            for part in scores.parts.values():
                np.testing.assert_array_equal(part, [1, 1, np.nan, 1, 1])
        assert not score(pool, ["a", "b"]).reasons


def test_a_function_that_always_hangs_delays_a_step_by_a_few_limits_only():
    with RewardPool([section("hangs_always", seconds=0.1), section("length")]) as pool:
        start = time.monotonic()
        scores = score(pool, ["x"] * 200)
    assert scores.failures == {("hangs_always", "timeout"): 200}
    assert len(scores.reasons) == 200 and (scores.parts["length"] == 1).all()
    assert time.monotonic() - start < 100 * 0.1


def test_a_slow_call_leaves_the_other_processes_to_those_of_other_threads(tmp_path):
    file = tmp_path / "go on"
    with RewardPool([section("waits", seconds=60.0, args={"file": str(file)})], workers=2) as pool:
        given = [["?"] * 2, ["bad", "bad"], [[0]] * 2, {}]
        slow, scores = threading.Thread(target=lambda: scores.append(pool.score(*given, workers=1))), []
        slow.start()
        while len(pool._idle) == 2:
            time.sleep(0.01)
        for _ in range(3):
            assert (score(pool, ["a", "b", "c"]).parts["waits"] == 1).all()
        assert not scores
        file.touch()
        slow.join()
        assert (scores[0].parts["waits"] == 1).all() and len(pool._idle) == 2


def test_an_interruption_ends_the_scoring_and_the_processes():
    with RewardPool([section("hangs_always", seconds=60)]) as pool:
        threading.Timer(0.3, pool.interrupt).start()
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(Interrupted):
                score(pool)
        workers = [worker._process for worker in pool._workers]
    assert time.monotonic() - start < 10
    assert all(worker.poll() is not None for worker in workers)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (f"{HERE}:lenght", "did you mean length?"),
        (f"{HERE.with_name('reward_function.py')}:length", "did you mean .*reward_functions.py"),
        ("exact_anser", "did you mean exact_answer?"),
        ("no.such.module:f", "rl.rewards: module no.such.module was not found"),
        ("jaxtrain.rl.nothing:f", "module jaxtrain.rl.nothing was not found"),
    ],
)
def test_a_wrong_name_is_an_error_at_once(function, message):
    with pytest.raises(ValueError, match=message):
        RewardPool([RewardSection(function=function)], workers=1)


def test_a_function_object_runs_in_this_process_and_a_failure_loses_its_sample():
    here = threading.current_thread().name
    seen = []

    def local(completions, bonus, **_):
        seen.append(threading.current_thread().name)
        if "bad" in completions:
            raise RuntimeError("no")
        return [None if text == "bb" else len(text) + bonus for text in completions]

    def hangs(completions, **_):
        if "bad" in completions:
            time.sleep(3)
        return [1] * len(completions)

    given = [RewardSection(function=local, args={"bonus": 10}), RewardSection(function=hangs, seconds=0.4)]
    with RewardPool([*given, section("length")]) as pool:
        scores = score(pool)
    np.testing.assert_array_equal(scores.parts["local"], [11, np.nan, np.nan, 14, 15])
    np.testing.assert_array_equal(scores.parts["hangs"], [1, 1, np.nan, 1, 1])
    np.testing.assert_array_equal(scores.parts["length"], [1, 2, 3, 4, 5])
    assert scores.failures == {("local", "error"): 1, ("hangs", "timeout"): 1}
    assert scores.reasons == {2: "local: RuntimeError: no"}
    assert seen and here not in seen
