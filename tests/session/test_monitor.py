import time

import pytest

from jaxtrain.observe.heartbeat import Heartbeat, read_heartbeats
from jaxtrain.session.monitor import RunMonitor
from jaxtrain.train.preemption import Interrupted
from jaxtrain.train.watchdog import Watchdog

SAVED = {"steps": 60.0, "compiling": 10.0}
LATER = {"seconds": {"steps": 80.0, "compiling": 10.0}}


@pytest.mark.parametrize(
    ("state", "step", "lost"), [("stopped", 8, 0), ("finished", 8, 0), ("running", 12, 20 + 100), ("failed", 8, 120)]
)
def test_what_a_failure_undid_and_the_time_until_the_run_goes_on_are_lost(tmp_path, state, step, lost):
    Heartbeat(tmp_path, 0, 1, lambda: LATER | {"step": step}).stop(state, time=time.time() - 100)
    monitor = RunMonitor(tmp_path, Watchdog())
    monitor.carry_over(SAVED, 8)
    seconds = monitor.wall.seconds()
    assert seconds["steps"] == 60 and seconds["lost"] == pytest.approx(lost, abs=5)


def test_a_session_is_followed_to_its_end(tmp_path):
    watchdog = Watchdog()
    monitor = RunMonitor(tmp_path, watchdog)
    with monitor.running(4, 10):
        for step in (5, 6):
            time.sleep(0.05)
            with watchdog.waits("a step"):
                time.sleep(0.1)
            monitor.stepped(step)
        metrics = monitor.metrics()
    (beat,) = read_heartbeats(tmp_path)
    assert (beat["state"], beat["step"], beat["first_step"], beat["of_steps"]) == ("finished", 6, 4, 10)
    assert 0.05 <= beat["host_times"]["own"] < beat["host_times"]["step"] - 0.09
    assert metrics["goodput"] > 0.9


@pytest.mark.parametrize(("error", "state"), [(Interrupted(), "stopped"), (ValueError("no data"), "failed")])
def test_the_last_heartbeat_tells_how_the_session_ended(tmp_path, error, state):
    with pytest.raises(type(error)), RunMonitor(tmp_path, Watchdog()).running(0, 10):
        raise error
    (beat,) = read_heartbeats(tmp_path)
    assert beat["state"] == state and beat.get("error") == ("ValueError: no data" if state == "failed" else None)
