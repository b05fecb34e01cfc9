"""The connections between processes, all in one process here: what ends it is recorded instead."""

import os
import socket
import threading
import time

import pytest

from jaxtrain.parallel import peers
from jaxtrain.parallel.peers import KILLED, JobFailure, Peers, report_error

TOKEN = "secret"


def until(true, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


@pytest.fixture
def ended(monkeypatch):
    """The exit codes with which processes would have ended, by thread."""
    codes = []

    def end(code: int, message: str = "") -> None:
        codes.append(code)

    monkeypatch.setattr(peers, "end_process", end)
    monkeypatch.setattr(peers, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(peers, "_OTHERS_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(peers, "_LAST_SECONDS", 0.1)
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    monkeypatch.setattr(peers.atexit, "register", lambda hook: None)
    yield codes
    for thread in threading.enumerate():
        if thread.name == "failure":
            thread.join()  # while its end is only recorded


def job(count: int, within: float = 30.0) -> tuple[list[Peers], list[list[int]]]:
    """The processes of a job, and the signals of which each was told."""
    first, port = Peers.listen(count, TOKEN, 0, within, 10.0)
    address = ("localhost", port)
    members = [first, *(Peers.connect(process, address, TOKEN, within, 10.0) for process in range(1, count))]
    told = [[] for _ in members]
    for member, signals in zip(members, told, strict=True):
        member.on_stop = signals.append
    assert until(lambda: first._listener is None)
    return members, told


def kill(member: Peers) -> None:
    """As the kernel does with the connections of a process that ends, which itself reacts to nothing any more."""
    member._failure = JobFailure(member.process, member.host, "it is dead", KILLED)
    for connection in list(member._connections):
        connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_of_one_process_is_known_to_all(ended, culprit, capfd):
    members, _ = job(3)
    members[culprit].error("no such row", 2)
    assert until(lambda: len(ended) == 3) and set(ended) == {2}
    expected = f"process {culprit} on {socket.gethostname()} failed, so all processes of the job end: no such row"
    assert until(lambda: capfd.readouterr().err.count(expected) + 3 >= 3)
    assert all(member.failed.is_set() for member in members)
    assert {member._failure for member in members} == {JobFailure(culprit, socket.gethostname(), "no such row", 2)}


def test_the_first_error_counts(ended):
    members, _ = job(2)
    members[1].error("first", 2)
    assert until(lambda: members[0].failed.is_set())
    members[0].error("second", 1)
    assert until(lambda: len(ended) == 2) and set(ended) == {2}


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_process_is_noticed_by_all_others(ended, killed):
    members, _ = job(3)
    kill(members[killed])
    others = [member for member in members if member is not members[killed]]
    assert until(lambda: all(member.failed.is_set() for member in others))
    for member in others:
        failure = member._failure
        assert failure is not None and (failure.process, failure.code) == (killed, KILLED)
        assert failure.host == socket.gethostname() and "killed" in failure.error


def test_the_end_of_process_0_is_noticed_by_all(ended):
    members, _ = job(3)
    kill(members[0])
    assert until(lambda: all(member.failed.is_set() for member in members[1:]))
    assert all(member._failure is not None and member._failure.process == 0 for member in members[1:])


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_stop_is_passed_on_once(ended, asked):
    members, told = job(3)
    members[asked].stop(15)
    expected = [[15]] * 3
    expected[asked] = []
    assert until(lambda: told == expected)
    for member in members:
        member.stop(2)
    time.sleep(0.2)
    assert told == expected
    assert not ended


def test_a_process_that_ends_after_a_request_to_stop_has_its_exit_code(ended):
    members, told = job(2)
    members[1].stop(15)
    assert until(lambda: told[0] == [15])
    kill(members[1])
    assert until(lambda: bool(ended)) and ended[0] == 143
    failure = members[0]._failure
    assert failure is not None and "SIGTERM" in failure.error


def test_processes_that_need_each_other_no_more_may_end_in_any_order(ended):
    members, told = job(3)
    for member, signals in zip(members, told, strict=True):
        member.arrive(signals.append)
    for member in members:
        member.leave()
    assert until(lambda: all(not each.here for each in members[0]._connections.values()))
    kill(members[1])
    kill(members[0])
    time.sleep(0.3)
    assert not ended and not any(member.failed.is_set() for member in members)


@pytest.mark.parametrize("before", [True, False])
def test_a_process_that_has_left_and_ended_is_a_failure_for_one_that_still_needs_it(ended, before):
    """As process 0 that exports a stage's model, while the others begin the next stage."""
    members, told = job(3)
    if before:
        members[2].arrive(told[2].append)
    members[1].leave()
    assert until(lambda: any(not each.here for each in members[0]._connections.values()))
    kill(members[1])
    if not before:
        time.sleep(0.3)
        assert not members[2].failed.is_set()
        members[2].arrive(told[2].append)
    assert until(lambda: members[2].failed.is_set())
    assert members[2]._failure is not None and members[2]._failure.process == 1


def test_whether_another_process_is_busy(ended):
    members, _ = job(3)
    states = lambda: [member.others_busy for member in members]  # noqa: E731
    members[1].busy(True)
    assert until(lambda: states() == [True, False, True])
    members[0].busy(True)
    assert until(lambda: states() == [True, True, True])
    members[1].busy(False)
    assert until(lambda: states() == [False, True, True])
    members[0].busy(False)
    assert until(lambda: states() == [False, False, False])


def test_a_stranger_is_not_listened_to(ended):
    first, port = Peers.listen(2, TOKEN, 0, 30.0, 10.0)
    for text in (b'wrong 1 host\n{"kind": "stop", "number": 9}\n', b"\n", b"\xff\xfe\n", b""):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(text)
            if text:
                assert stranger.recv(1) == b""  # closed
    second = Peers.connect(1, ("localhost", port), TOKEN, 30.0, 10.0)
    assert until(lambda: first._listener is None)
    first.stop(15)
    assert until(lambda: second._stop == 15)
    assert not first.failed.is_set()


def test_a_process_that_never_connects_is_named(ended):
    first, port = Peers.listen(3, TOKEN, 0, 1.0, 10.0)
    Peers.connect(2, ("localhost", port), TOKEN, 1.0, 10.0)
    assert until(lambda: bool(ended))
    assert first._failure is not None and "processes 1 have not connected" in first._failure.error


def test_an_error_outside_of_a_run_is_reported(ended, monkeypatch):
    report_error("alone", 1)
    members, _ = job(2)
    monkeypatch.setattr(peers, "current", members[1])
    report_error("between two stages", 1)
    assert until(lambda: len(ended) == 2)
    assert members[0]._failure is not None and members[0]._failure.error == "between two stages"


def test_the_stacks_of_all_threads_are_printed(ended, capfd):
    members, _ = job(2)
    hold = threading.Event()
    thread = threading.Thread(target=hold.wait, name="waits")
    thread.start()
    members[1].error("step 7 has not come back", 124, stacks=True)
    assert until(lambda: len(ended) == 2)
    hold.set()
    said = capfd.readouterr().err
    assert said.count("Current thread") == 2 and "test_peers.py" in said
