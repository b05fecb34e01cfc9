"""A trace of some steps, for xprof and Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import jax

from jaxtrain.observe.run_files import PROFILE

log = logging.getLogger(__name__)


class StepProfile:
    """Context manager of the training loop: traces `[first, count]` steps into `profile/` of the run's folder.

    Every process traces its own devices. `wait` is called before the trace ends, so that it has the whole last step.
    """

    def __init__(self, run: Path, steps: Sequence[int] | None, wait: Callable[[], None]) -> None:
        self._folder, self._wait = run / PROFILE, wait
        self._first, self._count = steps or (0, 0)
        self._tracing = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()

    def before(self, step: int) -> None:
        """Step `step` will be dispatched."""
        if self._count and step == self._first:
            self._wait()
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True

    def after(self, step: int) -> None:
        """Step `step` was dispatched."""
        if self._tracing and step >= self._first + self._count - 1:
            self._wait()
            self._stop()
            log.info("steps %d to %d are traced in %s (docs/performance.md)", self._first, step, self._folder)

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
