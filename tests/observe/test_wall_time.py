"""Every second of a run belongs to one activity."""

import pytest

from jaxtrain.observe.wall_time import ACTIVITIES, WallTime


class Clock:
    def __init__(self):
        self.now = self.seconds = 0.0

    def pass_(self, seconds, compiling=0.0):
        self.now += seconds
        self.seconds += compiling  # as `Compilations` counts them


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def wall(clock):
    return WallTime(lambda: clock.now, clock)


def spent(wall):
    return {name: seconds for name, seconds in wall.seconds().items() if seconds}


def test_seconds_add_up_and_compiling_counts_apart(wall, clock):
    clock.pass_(2)
    wall.become("steps")
    clock.pass_(10, compiling=4)
    with wall.spent("evaluating"):
        clock.pass_(5, compiling=1)
        with wall.spent("saving"):
            clock.pass_(1)
    wall.during("other", lambda: clock.pass_(3))()
    assert spent(wall) == {"loading": 2, "steps": 6, "compiling": 5, "evaluating": 4, "saving": 1, "other": 3}
    metrics = wall.metrics()
    assert metrics["goodput"] == pytest.approx(6 / 21) and metrics["time_share/compiling"] == pytest.approx(5 / 21)
    assert sum(metrics.values()) == pytest.approx(1) and len(metrics) == len(ACTIVITIES)


def test_an_exception_ends_an_activity(wall, clock):
    wall.become("steps")
    with pytest.raises(ValueError, match="no"), wall.spent("saving"):
        clock.pass_(1)
        raise ValueError("no")
    assert wall.activity == "steps"


def test_seconds_of_earlier_sessions_are_added(wall, clock):
    wall.add({"steps": 7.0, "lost": 2.0})
    clock.pass_(1)
    assert spent(wall) == {"steps": 7, "lost": 2, "loading": 1}
