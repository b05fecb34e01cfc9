import pytest

from jaxtrain.train.watchdog import FLOOR_SECONDS, Watchdog


def waited(watchdog: Watchdog, seconds: int, others_busy: bool = False, stopping: bool = False) -> str:
    """What was late, if anything, when a wait of so many seconds ended."""
    late = ""
    with watchdog.waits("step 7"):
        for _ in range(seconds + 1):  # the first tick sees that another wait has begun
            watchdog.tick(1.0, others_busy)
            late = late or watchdog.late(stopping)
    watchdog.tick(1.0)
    return late


@pytest.fixture
def learned() -> Watchdog:
    watchdog = Watchdog()
    for _ in range(3):
        assert waited(watchdog, 2) == ""
    return watchdog


def test_no_wait_is_late_before_the_usual_one_is_known():
    watchdog = Watchdog()
    for _ in range(3):
        assert waited(watchdog, 10 * int(FLOOR_SECONDS)) == ""


def test_a_wait_is_late_after_the_floor_or_ten_times_the_usual_one(learned):
    assert waited(learned, int(FLOOR_SECONDS)) == ""
    assert "step 7 has not come back within 300 seconds" in waited(learned, int(FLOOR_SECONDS) + 1)
    for _ in range(9):
        waited(learned, 100)
    assert waited(learned, 1000) == ""
    assert "within 1000 seconds" in waited(learned, 1001)


def test_a_given_limit_holds_from_the_first_wait():
    assert waited(Watchdog(20), 20) == ""
    assert "within 20 seconds" in waited(Watchdog(20), 21)


def test_a_run_that_was_asked_to_stop_waits_shorter(learned):
    assert waited(learned, 19, stopping=True) == ""
    assert "within 20 seconds" in waited(learned, 21, stopping=True)


def test_what_is_not_waited_for_may_take_long(learned):
    for _ in range(10_000):
        learned.tick(1.0)
        assert learned.late() == ""


def test_many_short_waits_are_not_one_long_one(learned):
    for _ in range(10_000):
        with learned.waits("the next batch"):
            learned.tick(1.0)
            assert learned.late() == ""


def test_others_that_are_busy_are_waited_for(learned):
    assert waited(learned, 10_000, others_busy=True) == ""
    with learned.waits("step 8"):
        for _ in range(1000):
            learned.tick(1.0, True)
        for _ in range(int(FLOOR_SECONDS)):
            learned.tick(1.0, False)
            assert learned.late() == ""
        learned.tick(1.0, False)
        assert learned.late()


@pytest.mark.parametrize(("limit", "after"), [(None, 60), (20, 10)])
def test_a_process_that_does_not_wait_for_long_is_busy(limit, after):
    watchdog = Watchdog(limit)
    for second in range(100):
        watchdog.tick(1.0)
        assert watchdog.busy() == (second + 1 > after)
    with watchdog.waits("step 1"):
        watchdog.tick(1.0)
        assert not watchdog.busy()
