"""The training loop: a generator. What happens every N steps is the business of whoever iterates."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.train.step import Step, StepReport
from jaxtrain.types import Batch, TrainState

log = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class StepResult(NamedTuple):
    step: int  # optimizer steps taken, this one included
    state: TrainState
    report: StepReport  # still on the device: reading it waits for the step
    batch: Batch  # this host's rows
    seconds: float  # since the step before was handed out: the pace, not the latency


def train(
    step: Step,
    state: TrainState,
    batches: Iterator[Batch],
    place: Callable[[Batch], Batch],
    *,
    steps: int,
    max_skipped_in_a_row: int,
    inspection_dir: Path,
) -> Iterator[StepResult]:
    """Take steps until `steps` have been taken in all or the batches run dry, yielding after each.

    The host runs one step ahead of the device: it looks at a step's report only once the next one has been sent off.
    Raises NonFiniteError after `max_skipped_in_a_row` skipped steps, with their batches in `inspection_dir`.
    """
    recent: deque[Batch] = deque(maxlen=max_skipped_in_a_row + 1)
    before: StepReport | None = None
    first = int(state.step) + 1
    last_time = time.perf_counter()
    for number in range(first, steps + 1):
        batch = next(batches, None)
        if batch is None:
            log.warning("the training data ran dry after step %d of %d", number - 1, steps)
            break
        recent.append(batch)
        state, report = step(state, place(batch))
        if number == first + 1:
            _warn_of_recompilation(step, batch)
        if before is not None:
            check_finite(before, recent, max_skipped_in_a_row, number - 1, inspection_dir)
        before, now = report, time.perf_counter()
        yield StepResult(number, state, report, batch, now - last_time)
        last_time = now
    if before is not None:
        check_finite(before, recent, max_skipped_in_a_row, int(state.step), inspection_dir)


def check_finite(report: StepReport, recent: Sequence[Batch], limit: int, step: int, folder: Path) -> None:
    """Raises NonFiniteError where `limit` steps in a row up to `step` were skipped; their batches are then in `folder`.

    `recent` are the last batches, on the host.
    """
    in_a_row = int(report.skipped_in_a_row)
    if in_a_row:
        log.warning("step %d was skipped: its loss or gradient is not finite (%d in a row)", step, in_a_row)
    if in_a_row < limit:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"non_finite_step_{step}_process_{jax.process_index()}.npz"
    np.savez(path, **_stacked(recent))
    raise NonFiniteError(
        f"{in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite; their batches are in "
        f"{path}. The parameters are those before the first of them. A lower optimizer.learning_rate, a longer "
        "optimizer.warmup_steps or model.compute_dtype=float32 often help"
    )


def _stacked(batches: Sequence[Batch]) -> dict[str, Any]:
    """All arrays of the batches, signals included, as [batches, rows, ...]; `rows` [batches] counts the real rows.

    Batches of reinforcement learning differ in rows; the shorter ones are filled up with rows of zeros, which are
    padding. A signal that some of them lack is left out.
    """
    columns = [batch.arrays() for batch in batches]
    rows = [len(batch.tokens) for batch in batches]
    names = [name for name in columns[0] if all(name in each for each in columns)]

    def filled(array: Any) -> np.ndarray:
        return np.pad(array, [(0, max(rows) - len(array))] + [(0, 0)] * (np.ndim(array) - 1))

    stacked: dict[str, Any] = {name: np.stack([filled(each[name]) for each in columns]) for name in names}
    return {**stacked, "rows": np.array(rows)}


def _warn_of_recompilation(step: Step, batch: Batch) -> None:
    compiled = getattr(step, "_cache_size", lambda: 1)()
    if compiled > 1:
        shapes = {name: leaf.shape for name, leaf in batch._asdict().items() if hasattr(leaf, "shape")}
        log.warning("the step was compiled %d times; the last batch had the shapes %s", compiled, shapes)
