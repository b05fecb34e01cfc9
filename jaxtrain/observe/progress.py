"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from jaxtrain.observe.status import duration_text

_FORMATS = {  # metric name -> its format, in the order of display
    "reward": "reward {:.3f}",
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
    "eta": "eta {}",
}
_LEFT_OUT = ("learning_rate", "grad_norm", "mfu", "tokens_per_second", "eta")  # first where a line has too little room
_SILENT_SECONDS = 60.0  # after which plain lines say what the run is busy with
_QUIET_SECONDS = 5.0  # the same, where it is anything else than steps
_REFRESHES = 4.0  # of the bar, in a second


class Progress:
    """Context manager of the training loop; prints on process 0 only.

    rich detects terminals, and respects NO_COLOR (https://no-color.org).
    """

    def __init__(
        self,
        steps: int | None = None,
        start: int = 0,
        console: Console | None = None,
        *,
        activity: Callable[[], str] = lambda: "step",
        record: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`steps`: None until `begin`. `activity` returns what the run is busy with, from any thread. `record` is
        called with everything that is printed, at full length.
        """
        self._steps, self._step = steps, start
        self._console = console or Console(highlight=False, quiet=jax.process_index() != 0)
        self._activity, self._record = activity, record
        self._first: tuple[int, float] | None = None
        self._opened = self._printed = time.monotonic()
        self._closed = threading.Event()
        width = 10 if self._console.width < 100 else 30
        columns = (
            _Activity(activity),
            BarColumn(bar_width=width),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        shows_bar = self._console.is_terminal and not self._console.quiet
        self._bar = Bar(
            *columns, console=self._console, disable=not shows_bar, refresh_per_second=_REFRESHES, transient=True
        )
        self._fixed = len("evaluating") + width + len("0:00:00") + 4  # columns beside the numbers and the metrics
        self._task = self._bar.add_task("", total=steps, completed=start, shown="")
        self._speaker = None if shows_bar or self._console.quiet else threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Self:
        self._bar.start()
        if self._speaker is not None:
            self._speaker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._speaker is not None:
            self._speaker.join()
        self._bar.stop()

    def begin(self, steps: int, start: int) -> None:
        """The run has `steps` steps, of which `start` are done. From then on the bar stays when it ends."""
        self._steps, self._step = steps, start
        self._bar.live.transient = False
        self._bar.update(self._task, total=steps, completed=start)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._opened

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` steps are done, with `metrics` to display. Prints a line if there is no terminal."""
        now = time.monotonic()
        # The first step compiles, so time is measured from its end.
        self._first = self._first or (step, now)
        self._step = step
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        values: dict[str, Any] = {**metrics, **({"eta": eta} if (eta := self._eta(now)) else {})}
        parts = {name: form.format(values[name]) for name, form in _FORMATS.items() if name in values}
        title = f"step {step}/{self._steps}"
        full = "  ".join([title, *parts.values()])
        if self._console.is_terminal:
            room = self._console.width - self._fixed - len(title.removeprefix("step "))
            self._bar.update(self._task, completed=step, shown="  ".join(_fitting(parts, room)))
            self._record(full)
        else:
            self._print("  ".join([title, *_fitting(parts, self._room - len(title) - 2)]), full)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(text, text)

    def values(self, title: str, values: Mapping[str, float]) -> None:
        """Print a title and named numbers, in lines that fit."""
        parts = [f"{name} {value:.4f}" for name, value in values.items()]
        lines, indent = [title], " " * (len(title) if len(title) < 20 else 4)
        for part in parts:
            if len(lines[-1]) + 2 + len(part) > self._room and lines[-1].strip():
                lines.append(indent)
            lines[-1] += f"  {part}"
        self._print("\n".join(lines), "  ".join([title, *parts]))

    def facts(self, facts: Iterable[tuple[str, str]]) -> None:
        """Print named texts as two columns, wrapped where the terminal ends."""
        facts = [fact for fact in facts if fact[1]]
        width = max((len(name) for name, _ in facts), default=0) + 2
        for name, text in facts:
            full = f"{name:<{width}}{text}"
            lines = textwrap.wrap(
                full,
                max(self._room, width + 20),
                subsequent_indent=" " * width,
                break_long_words=False,
                break_on_hyphens=False,
            )
            self._print("\n".join(lines), full)

    def show(self, table: Table) -> None:
        """Print a table above the bar."""
        self._console.print(table)
        self._printed = time.monotonic()

    @property
    def _room(self) -> int:
        return self._console.width - (0 if self._console.is_terminal else len(_clock()) + 1)

    def _print(self, text: str, full: str) -> None:
        """`full` is recorded. Where there is no terminal the lines begin with the time."""
        self._record(full)
        if not self._console.is_terminal:
            clock = _clock()
            text = textwrap.indent(text, f"{clock} ", lambda line: True)
        self._console.print(text, markup=False, soft_wrap=True)
        self._printed = time.monotonic()

    def _speak(self) -> None:
        """Until the end, a line for what lasts longer than seconds, and for each minute without another line."""
        said = ""
        while not self._closed.wait(1.0):
            silent, activity = time.monotonic() - self._printed, self._activity()
            if silent < _QUIET_SECONDS:
                said = said if activity == said else ""
            elif silent >= _SILENT_SECONDS or activity not in (said, "training", "sampling"):
                at = f"step {self._step}/{self._steps}  " if self._steps else ""
                self.print(f"{at}{activity} ({duration_text(self.seconds)} since the start)")
                said = activity

    def _eta(self, now: float) -> str:
        assert self._first is not None
        step, then = self._first
        if self._step == step or self._steps is None:
            return ""
        left = (now - then) / (self._step - step) * (self._steps - self._step)
        return duration_text(left)


class _Activity(ProgressColumn):
    """What the run is busy with."""

    def __init__(self, activity: Callable[[], str]) -> None:
        self._activity = activity
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"{self._activity():<10}")


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _fitting(parts: Mapping[str, str], room: int) -> Sequence[str]:
    """Those of the parts that fit into `room` columns; the first always does."""
    left = dict(parts)
    for name in _LEFT_OUT:
        if len("  ".join(left.values())) <= room or len(left) == 1:
            break
        left.pop(name, None)
    return list(left.values())
