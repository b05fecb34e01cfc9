"""Concurrent calls that return, raise and hang."""

import asyncio
import threading
import time
from functools import partial

import pytest

from jaxtrain.rl.deadlines import awaited, call_all, error_text, time_left
from jaxtrain.train.preemption import Interrupted


@pytest.fixture
def over():
    """Releases hanging calls at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def fail():
    raise SystemExit("no further")


def test_results_exceptions_and_timeouts_are_in_order(over):
    calls = [partial(int, "7"), fail, over.wait, partial(str, 3)]
    seven, raised, late, three = call_all(calls, 2)
    assert (seven, three) == (7, "3")
    assert isinstance(raised, SystemExit) and str(raised) == "no further"
    assert isinstance(late, TimeoutError) and str(late) == "took longer than 2 seconds"
    assert call_all([], 1.0) == []


def test_a_call_that_waits_for_its_turn_is_not_late():
    assert call_all([partial(time.sleep, 1)] * 40, 2.5) == [None] * 40  # three rounds


def test_an_interruption_ends_the_wait(over):
    interrupted = threading.Event()
    threading.Timer(0.2, interrupted.set).start()
    start = time.monotonic()
    with pytest.raises(Interrupted):
        call_all([over.wait] * 3, 60, interrupted)
    assert time.monotonic() - start < 10


def test_when_many_calls_hang_the_others_are_not_started(over):
    tried = []

    def hang(index):
        tried.append(index)
        over.wait()

    answers = call_all([partial(hang, index) for index in range(400)], 0.1)
    assert all(isinstance(answer, TimeoutError) for answer in answers)
    assert "not started" in str(answers[-1])
    assert len(tried) < 200


def test_a_few_that_return_do_not_prolong_the_wait_for_many_that_hang(over):
    tried = []

    def hang_mostly(index):
        tried.append(index)
        if index % 10:
            over.wait()

    answers = call_all([partial(hang_mostly, index) for index in range(400)], 0.1)
    assert "not started" in str(answers[-1])
    assert len(tried) < 250


def test_awaitables_share_one_event_loop_and_other_values_pass():
    async def loop():
        return asyncio.get_running_loop()

    assert awaited(3) == 3 and awaited(None) is None
    assert awaited(loop()) is awaited(loop())
    with pytest.raises(ZeroDivisionError):
        awaited(divide())


async def divide():
    return 1 / 0


def test_a_coroutine_that_blocks_its_loop_does_not_block_the_others(over):
    async def block():
        over.wait()

    async def seven():
        return 7

    (late,) = call_all([partial(awaited, block())], 0.1)
    assert isinstance(late, TimeoutError)
    assert call_all([partial(awaited, seven())], 5.0) == [7]


def test_a_call_knows_how_much_time_it_has_left():
    def later():
        time.sleep(0.2)
        return time_left()

    now, soon = call_all([time_left, later], 5.0)
    assert 4.5 < now <= 5.0 and 4.3 < soon <= 4.8
    assert time_left() == float("inf")


def test_the_text_of_any_error_is_readable():
    assert error_text(ValueError("no")) == "no"
    assert error_text(KeyboardInterrupt()) == ""
    assert error_text(ValueError("half of \ud800")) == "half of \\ud800"
