import pytest

from jaxtrain.observe.stragglers import HostTimes, Stragglers, host_time_metrics


def times(*own, step=2.0):
    return [HostTimes(f"host-{number}", each, 0.0, step) for number, each in enumerate(own)]


def test_a_process_that_is_slow_twice_in_a_row_is_named_once(caplog):
    stragglers = Stragglers()
    assert stragglers.update(times(0.2, 0.3, 1.9)) == []
    assert stragglers.update(times(0.2, 0.3, 1.9)) == [2] and stragglers.update(times(0.2, 0.3, 1.9)) == [2]
    (record,) = caplog.records
    assert "process 2 on host-2 holds up the others: of a step of 2 s it is busy for 1.9 s" in record.getMessage()
    assert stragglers.update(times(0.2, 0.3, 0.2)) == []
    assert stragglers.update(times(0.2, 0.3, 1.9)) == []  # once may be chance


@pytest.mark.parametrize("own", [(0.2, 0.3, 0.5), (0.001, 0.001, 0.1)])
def test_little_more_than_the_others_or_than_nothing_is_not_slow(own):
    stragglers = Stragglers()
    assert [stragglers.update(times(*own)) for _ in range(3)] == [[]] * 3


def test_metrics_of_all_processes():
    metrics = host_time_metrics(times(0.2, 0.4, 0.3))
    assert metrics == pytest.approx({"host_time/mean": 0.3, "host_time/max": 0.4, "host_time/slowest_process": 1})
