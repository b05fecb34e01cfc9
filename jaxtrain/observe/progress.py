"""What a person sees of a run: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

_SHOWN = {  # metric name -> what is shown of it, in this order
    "reward": "reward {:.3f}",
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
}


class Progress:
    """A context manager around the training loop, silent on all processes but 0.

    rich decides what a terminal is, and honours NO_COLOR (https://no-color.org).
    """

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self._steps, self._step = steps, start
        self._console = console or Console(highlight=False, quiet=jax.process_index() != 0)
        self._first: tuple[int, float] | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("step", total=steps, completed=start, shown="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that `step` steps are done. With `metrics`, show them: a line of their own where there is no terminal."""
        now = time.monotonic()
        # The first step compiles: time is counted from its end.
        self._first = self._first or (step, now)
        self._step = step
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        shown = "  ".join(part for part in (_format(metrics), self._eta(now)) if part)
        self._bar.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self._line(f"step {step}/{self._steps}  {shown}")

    def print(self, text: str) -> None:
        """A line above the bar: an evaluation, a saved checkpoint, a warning."""
        self._line(text)

    def show(self, table: Table) -> None:
        """A table above the bar."""
        self._console.print(table)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _eta(self, now: float) -> str:
        assert self._first is not None
        step, then = self._first
        if self._step == step:
            return ""
        left = (now - then) / (self._step - step) * (self._steps - self._step)
        return f"eta {timedelta(seconds=round(left))}"


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics)
