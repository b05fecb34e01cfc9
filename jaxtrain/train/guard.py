"""Checks of the reports of steps: losses that are not finite, and recompilation."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.train.step import StepReport
from jaxtrain.train.watchdog import Watchdog
from jaxtrain.types import Batch

log = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


def check_finite(
    report: StepReport, recent: Sequence[Batch], limit: int, step: int, folder: Path, role: str = "policy"
) -> None:
    """Raises NonFiniteError if `limit` steps in a row up to `step` were skipped, and writes their batches to `folder`.

    `recent` are the last batches, on the host. `role` is the model that the steps trained: "policy" or "critic".
    """
    in_a_row = int(report.skipped_in_a_row)
    if not in_a_row:
        return
    of_role = "" if role == "policy" else f" of the {role}"
    log.warning(f"step %d{of_role} was skipped: its loss or gradient is not finite (%d in a row)", step, in_a_row)
    if in_a_row < limit:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"non_finite_step_{step}_process_{jax.process_index()}.npz"
    np.savez(path, **_stacked(recent))
    rate = "optimizer.learning_rate" if role == "policy" else f"rl.{role}.learning_rate"
    raise NonFiniteError(
        f"{in_a_row} steps{of_role} in a row up to step {step} had a loss or gradient that is not finite; their "
        f"batches are in {path}. The parameters{of_role} are those before these steps. A lower {rate}, a longer "
        "optimizer.warmup_steps or model.compute_dtype=float32 often help"
    )


class FiniteChecks:
    """Checks the reports of a step after the next one was dispatched, so that the host is one step ahead of the device.

    `limit` and `folder` are those of `check_finite`.
    """

    def __init__(self, limit: int, folder: Path, watchdog: Watchdog):
        self._limit, self._folder, self._watchdog = limit, folder, watchdog
        self.recent: deque[Batch] = deque(maxlen=limit + 1)  # of the last steps, the one that is dispatched included
        self._unchecked: tuple[int, Mapping[str, StepReport]] | None = None

    def stepped(self, step: int, reports: Mapping[str, StepReport]) -> None:
        """The reports of `step`, by role, are checked by the next `check`."""
        self._unchecked = step, reports

    def check(self) -> None:
        """Raise NonFiniteError if the update was not finite in too many consecutive steps, up to the previous one."""
        if self._unchecked is None:
            return
        (step, reports), self._unchecked = self._unchecked, None
        with self._watchdog.waits(f"step {step}"):
            for name, report in reports.items():
                check_finite(report, self.recent, self._limit, step, self._folder, name)


def _stacked(batches: Sequence[Batch]) -> dict[str, Any]:
    """All arrays of the batches, signals included, as [batches, rows, ...]; `rows` [batches] counts the rows of each.

    Batches of reinforcement learning differ in rows; shorter ones are padded with rows of zeros. A signal that is not
    in all batches is omitted.
    """
    columns = [batch.arrays() for batch in batches]
    rows = [len(batch.tokens) for batch in batches]
    names = [name for name in columns[0] if all(name in each for each in columns)]

    def filled(array: Any) -> np.ndarray:
        return np.pad(array, [(0, max(rows) - len(array))] + [(0, 0)] * (np.ndim(array) - 1))

    stacked: dict[str, Any] = {name: np.stack([filled(each[name]) for each in columns]) for name in names}
    return {**stacked, "rows": np.array(rows)}


def warn_of_recompilation(compilations: int, batch: Batch) -> None:
    """Log that the step was compiled more than once, with the shapes of `batch`."""
    if compilations > 1:
        shapes = {name: array.shape for name, array in batch.arrays().items()}
        log.warning("the step was compiled %d times; the last batch had the shapes %s", compilations, shapes)
