"""Metrics of a run on disk: `metrics.jsonl`, one JSON object per line, and TensorBoard."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import jax

from jaxtrain.observe.run_files import METRICS
from jaxtrain.observe.trackers import SafeTracker


class MetricLog:
    """Writes metrics.jsonl (and tensorboard/) to `run_dir`, on process 0 only.

    `resumed_from` is the step of the checkpoint that the run resumes from, None for a new run. Lines of later steps are
    removed, since these steps will be logged again: the file has the steps that led to the final parameters, each once.
    This requires that a step is logged before its checkpoint is saved, which is its first line. `evaluated`: whether it
    was evaluated by then too; else further lines of that step are removed as well. `trackers` get the same numbers as
    metrics.jsonl; steps that come again are reported to them again.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool,
        resumed_from: int | None = None,
        *,
        evaluated: bool = True,
        trackers: Sequence[SafeTracker] = (),
    ) -> None:
        self._file = self._board = None
        self._trackers = trackers
        if jax.process_index() != 0:
            return
        path = Path(run_dir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        last = -1 if resumed_from is None else resumed_from
        again = _drop_after(path, last, evaluated)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter  # imports torch, if that is installed: seconds

            # A value that is not finite is written as it is, without a line on the terminal for each.
            logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
            # TensorBoard drops whole steps, so what is kept of the last one is shown again. Its files are named by the
            # second: a number keeps two of the same second apart, and in their order.
            folder = path.parent / "tensorboard"
            suffix = f".{len(list(folder.glob('*'))):04d}"
            first = last + (again is None)
            self._board = SummaryWriter(str(folder), purge_step=first, filename_suffix=suffix)
            if again is not None:
                self._show(last, again)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and flush one line, `step` first. JSON knows finite numbers only: any other is written as null."""
        if self._file is None:
            return
        named = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in named.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._show(step, named)
        for tracker in self._trackers:
            tracker.log(step, named)

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._board is not None
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()  # so that a killed run has the steps before its newest checkpoint

    def close(self) -> None:
        """Close the files, and the runs of trackers."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _drop_after(path: Path, last: int, evaluated: bool) -> dict[str, float] | None:
    """Keep the lines up to step `last`, atomically, of which only the first is kept unless it was `evaluated`.

    An incomplete last line is removed. Returns the metrics of the first line of step `last` if others were removed.
    """
    if not path.exists():
        return None
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= last]
    of_last = [number for number, line in enumerate(kept) if _step(line) == last]
    repeated = len(of_last) > 1 and not evaluated
    if repeated:
        del kept[of_last[1] :]
    rewritten = path.with_suffix(".jsonl.tmp")
    rewritten.write_text("".join(kept), encoding="utf-8")
    os.replace(rewritten, path)
    if not repeated:
        return None
    values = json.loads(kept[-1]).items()
    return {name: math.nan if value is None else value for name, value in values if name != "step"}


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf
