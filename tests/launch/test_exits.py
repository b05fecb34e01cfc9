"""Which exit codes a restart may mend."""

import signal

import pytest

from jaxtrain.launch.exits import describe_exit, may_restart, shell_code


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, True), (2, False), (134, True), (137, True)])
def test_a_failure_is_restarted_and_an_error_of_the_users_is_not(code, again):
    assert may_restart(code) == again


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_run_that_was_asked_to_stop_is_not_restarted(number):
    assert not may_restart(128 + number)


def test_a_signal_is_named():
    assert shell_code(-signal.SIGKILL) == 137 and shell_code(3) == 3
    assert describe_exit(137) == "exit code 137 (SIGKILL)"
    assert describe_exit(2) == "exit code 2"
    assert describe_exit(255) == "exit code 255"
