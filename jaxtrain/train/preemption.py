"""Being asked to stop: SIGTERM, agreed upon by all hosts."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM  # 143, as a shell reports a process that SIGTERM ended


class Preemption:
    """Context manager that turns SIGTERM into an answer to "do we stop after this step?".

    With one process a signal handler sets a flag. With several, JAX's preemption service, which
    `jax.distributed.initialize` starts, listens for SIGTERM on every host: its notice travels over the coordination
    service, which picks one step that no host has passed. Asking costs no device collective and no message
    (see jax.experimental.multihost_utils.reached_preemption_sync_point).

    Must be entered from the main thread, as `signal.signal` demands.
    """

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> Self:
        # The service has its own handler, which ours would replace.
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`; the same answer on all hosts. Call once per step, in order."""
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(step)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
