"""What a run does every so many steps: its own actions, and the functions that `callbacks` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jaxtrain.config.sections import CallbackSection
from jaxtrain.named import load_named


@dataclass
class Scheduled:
    """An action that is due every so many steps, and once more at the end of the run."""

    due: Callable[[int], bool]
    run: Callable[[], None]
    done_at: int = 0  # the last step after which it ran


def load_callback(section: CallbackSection) -> Callable[[Any], Any]:
    """The function that is called with the Session. Raises ValueError for one that cannot be found or called."""
    function: Any = load_named(section.function, "callbacks.function")
    if not callable(function):
        raise ValueError(f"callbacks.function={section.function} is no function but {type(function).__name__}")
    return function


def run_once(actions: Iterable[Scheduled], step: int) -> None:
    """Run those that did not run after `step` yet."""
    for action in actions:
        if action.done_at < step:
            action.run()
            action.done_at = step


def mark_done(actions: Iterable[Scheduled], step: int, others: Iterable[tuple[Scheduled, int]]) -> None:
    """All have run after `step`, but each of `others` only after its own."""
    for action in actions:
        action.done_at = step
    for action, done_at in others:
        action.done_at = done_at
