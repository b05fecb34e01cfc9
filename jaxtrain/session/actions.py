"""What a run does every so many steps: its own actions, and the functions that `callbacks` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtrain.config.sections import CallbackSection
from jaxtrain.named import load_named


@dataclass
class Scheduled:
    """An action that is due every so many steps, and once more at the end of the run."""

    name: str  # by which a resumed run finds it again
    due: Callable[[int], bool]
    run: Callable[[], None]
    done_at: int = 0  # the last step after which it ran


def load_callback(section: CallbackSection) -> Callable[[Any], Any]:
    """The function that is called with the Session."""
    return load_named(section.function, "callbacks.function")


def callback_name(function: Callable[..., Any]) -> str:
    """The module and the name of a function, or those of the class of a callable object."""
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def actions_by_name(actions: Iterable[Scheduled]) -> dict[str, Scheduled]:
    """The actions, of which several with one name are numbered in their order."""
    found: dict[str, Scheduled] = {}
    seen: Counter[str] = Counter()
    for action in actions:
        seen[action.name] += 1
        found[action.name if seen[action.name] == 1 else f"{action.name} {seen[action.name]}"] = action
    return found


def run_once(actions: Iterable[Scheduled], step: int) -> None:
    """Run those that did not run after `step` yet."""
    for action in actions:
        if action.done_at < step:
            action.run()
            action.done_at = step


def mark_done(actions: Iterable[Scheduled], step: int, done_at: Mapping[str, int]) -> None:
    """All have run after `step`, but those in `done_at`, by name, only after that one."""
    for name, action in actions_by_name(actions).items():
        action.done_at = done_at.get(name, step)
