"""The process that calls reward functions: `python -m jaxtrain.rl.reward_worker FD`. It never imports JAX.

It is a fresh interpreter and not a fork, because a process in which JAX runs threads cannot be forked safely, and not
`multiprocessing`'s spawn either, because that would import the user's main script a second time.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, SupportsFloat

from jaxtrain.named import load_named
from jaxtrain.rl.deadlines import awaited

HOME = "jaxtrain.rl.rewards"


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # What a user's function prints goes to stderr, so that it is not mistaken for the trainer's output.
    os.dup2(2, 1)
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    functions: dict[str, Callable] = {}
    try:
        functions |= {path: load_named(path, "rl.rewards", HOME) for path in tasks.get()}
    except BaseException as error:
        connection.send(_message(error))
        return
    connection.send(None)
    while True:
        path, arguments = tasks.get()
        connection.send(call_reward(functions[path], arguments))


def _receive(connection: Connection, tasks: SimpleQueue[Any]) -> None:
    """Runs in a thread, so that a worker whose function hangs still exits when the trainer has exited."""
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def call_reward(function: Callable, arguments: dict[str, Any]) -> tuple[list[float | None] | None, str]:
    """The values, or None and what was raised. This is the boundary to a user's function, so it catches all of it."""
    try:
        _check_arguments(function, arguments)
        return _numbers(awaited(function(**arguments))), ""
    except BaseException as error:
        return None, _message(error)


def _check_arguments(function: Callable, arguments: dict[str, Any]) -> None:
    """Raises ValueError that names the columns that the function needs and the data lack."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin, whose call will say what it lacks
        return
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in arguments]:
        raise ValueError(
            f"it needs {', '.join(map(repr, missing))}, which is neither a column of the data nor one of `args`; there "
            f"are {', '.join(map(repr, arguments))}"
        )


def _numbers(values: Any) -> list[float | None]:
    """Raises TypeError for what is not a list of numbers and None."""
    if isinstance(values, str | bytes | dict) or not isinstance(values, Iterable):
        raise TypeError(f"it must return a list of numbers, one per sample, not {type(values).__name__}")
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"a reward must be a number or None, not {type(value).__name__}")
    return float(value)


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
