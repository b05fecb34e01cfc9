"""The process that calls reward functions: `python -m jaxtrain.rl.reward_worker FD`. It never imports JAX.

It is a fresh interpreter and not a fork, because a process in which JAX runs threads cannot be forked safely, and not
`multiprocessing`'s spawn either, because that would import the user's main script a second time.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from jaxtrain.named import load_named

HOME = "jaxtrain.rl.rewards"


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    # What the user's function prints is for people: it must not be taken for the trainer's own output.
    os.dup2(2, 1)
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    functions: dict[str, Callable] = {}
    try:
        functions |= {path: load_named(path, "rl.rewards", HOME) for path in tasks.get()}
    except BaseException as error:
        connection.send(_say(error))
        return
    connection.send(None)
    while True:
        path, arguments = tasks.get()
        connection.send(_call(functions[path], arguments))


def _receive(connection: Connection, tasks: SimpleQueue[Any]) -> None:
    """In a thread, so that a worker which hangs in a function still ends when the trainer has ended."""
    while True:
        try:
            tasks.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)


def _call(function: Callable, arguments: dict[str, Any]) -> tuple[list[Any] | None, str]:
    """The values, or None and what was raised. This is the boundary to foreign code, so it catches all of it."""
    try:
        values = function(**arguments)
        if inspect.isawaitable(values):
            values = asyncio.run(_awaited(values))
        return [None if value is None else float(value) for value in values], ""
    except BaseException as error:
        return None, _say(error)


async def _awaited(values: Any) -> Any:
    return await values


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
