"""The process that calls reward functions: `python -m jaxtrain.rl.reward_worker FD`. It never imports JAX.

It is a new interpreter: a process in which JAX runs threads cannot be forked safely, and the spawn method of
`multiprocessing` would import the user's main script again.
"""

import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple, SupportsFloat

from jaxtrain.named import load_named
from jaxtrain.rl.deadlines import awaited

HOME = "jaxtrain.rl.rewards"


class RewardCall(NamedTuple):
    """The outcome of a call of a reward function."""

    values: list[float | None] | None  # None: it failed
    message: str  # of the error, or empty
    metrics: Sequence[tuple[str, float]] = ()  # what it gave to `log_metric`
    extra: Mapping[str, list[Any]] = {}  # what it gave to `log_extra`: column -> a JSON value for each sample


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # Slurm signals every process of a job, and the trainer stops its workers. A function's own processes do not inherit
    # a handler, as they would SIG_IGN.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    # Redirect what a user's function prints to stderr, to keep it apart from the trainer's output.
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
        path, arguments, state = tasks.get()
        connection.send(tuple(call_reward(functions[path], arguments, state)))


def _receive(connection: Connection, tasks: SimpleQueue[Any]) -> None:
    """Runs in a thread, so that a worker whose function hangs still exits when the trainer has exited."""
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def call_reward(function: Callable, arguments: dict[str, Any], state: Mapping[str, Any] | None = None) -> RewardCall:
    """Call the function. This is the boundary to user code, so it catches every exception.

    It also gets TRL's further arguments that it has a parameter for, unless `arguments` has one of that name:
    `trainer_state`, with the attributes `state`, and the functions `log_metric` and `log_extra`.
    """
    metrics: list[tuple[str, float]] = []
    extra: dict[str, list[Any]] = {}

    def log_metric(name: str, value: float) -> None:
        metrics.append((str(name), float(value)))

    def log_extra(column: str, values: Iterable[Any]) -> None:
        given, count = list(values), len(arguments["completions"])
        if len(given) != count:
            raise ValueError(f"log_extra({str(column)!r}) has {len(given)} values for {count} samples")
        extra[str(column)] = json.loads(json.dumps(given, default=str))

    try:
        offered = {"trainer_state": SimpleNamespace(**state or {}), "log_metric": log_metric, "log_extra": log_extra}
        known = _check_arguments(function, arguments, offered)
        return RewardCall(_numbers(awaited(function(**known, **arguments))), "", metrics, extra)
    except BaseException as error:
        return RewardCall(None, _message(error))


def _check_arguments(function: Callable, arguments: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The `offered` arguments that the function has parameters for and `arguments` lacks.

    Raises ValueError with the names of required parameters that are not columns of the data.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin without a signature: calling it reports missing arguments
        return {}
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in arguments and name not in offered]:
        raise ValueError(
            f"it needs {', '.join(map(repr, missing))}, which is neither a column of the data nor one of `args`; "
            f"available are {', '.join(map(repr, arguments))}"
        )
    names = {p.name for p in parameters if p.kind in positional}
    accepts_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return {name: each for name, each in offered.items() if (accepts_all or name in names) and name not in arguments}


def _numbers(values: Any) -> list[float | None]:
    """Raises TypeError if the values are not a list of numbers and None."""
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
