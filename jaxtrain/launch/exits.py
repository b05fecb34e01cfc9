"""The meaning of exit codes of `jaxtrain train`: whether a restart may help."""

import signal

from jaxtrain.train.preemption import SIGNALS, exit_code

USER_ERROR = 2
"""The exit code of an error that the user corrects: of the config, of a file, or training that diverged."""
STOPPED = frozenset(exit_code(number) for number in SIGNALS)
"""Exit codes of a run that was asked to stop: it has saved its last step."""
NEAR_TIME_LIMIT = exit_code(signal.SIGUSR1)
"""The exit code of a run that a scheduler warned of the end of its time."""


def may_restart(code: int) -> bool:
    """Whether a process that ended with `code` may do better from the last checkpoint.

    Not after success, an error that the user corrects, or a request to stop. As in systemd's `Restart=on-failure`, a
    signal that asks a process to stop is no failure, and SIGKILL is one.
    """
    return code != 0 and code != USER_ERROR and code not in STOPPED


def shell_code(returncode: int) -> int:
    """The exit code that a shell reports for a `subprocess` return code, which is negative after a signal."""
    return exit_code(-returncode) if returncode < 0 else returncode


def describe_exit(code: int) -> str:
    """`exit code 137 (SIGKILL)`."""
    try:
        return f"exit code {code} ({signal.Signals(code - 128).name})"
    except ValueError:
        return f"exit code {code}"
