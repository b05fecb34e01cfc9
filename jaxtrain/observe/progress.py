"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

_FORMATS = {  # metric name -> its format, in the order of display
    "reward": "reward {:.3f}",
    "loss": "loss {:.4f}",
    "grad_norm": "grad_norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
}


class Progress:
    """Context manager of the training loop; prints on process 0 only.

    rich detects terminals, and respects NO_COLOR (https://no-color.org).
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
        """Report that `step` steps are done, with `metrics` to display. Prints a line if there is no terminal."""
        now = time.monotonic()
        # The first step compiles, so time is measured from its end.
        self._first = self._first or (step, now)
        self._step = step
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        shown = "  ".join(part for part in (_format(metrics), self._eta(now)) if part)
        self._bar.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self.print(f"step {step}/{self._steps}  {shown}")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table above the bar."""
        self._console.print(table)

    def _eta(self, now: float) -> str:
        assert self._first is not None
        step, then = self._first
        if self._step == step:
            return ""
        left = (now - then) / (self._step - step) * (self._steps - self._step)
        return f"eta {timedelta(seconds=round(left))}"


def _format(metrics: Mapping[str, float]) -> str:
    return "  ".join(form.format(metrics[name]) for name, form in _FORMATS.items() if name in metrics)
