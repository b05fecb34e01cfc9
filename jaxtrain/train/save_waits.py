"""Ends the waits of a save for the other processes once it has failed on one of them.

Orbax's background threads wait for all processes at barriers of the coordination service, for up to 20 minutes, and
for values in its key-value store. A process whose own part of a save has failed does not come to these barriers, and
waits at another one before it reports the error. Here it reports the error at once. The service fails a barrier on all
processes at once if one joins it with other participants, which `SaveWaits.end` does.

The only module that uses private names of orbax; tried with orbax-checkpoint 0.12.8. With a version that lacks them the
processes wait until orbax's own timeouts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import jax

_POLL_SECONDS = 0.5
_LAST_THREAD = "save_finalize"  # orbax's name of the thread that ends a save
_JOIN_MILLISECONDS = 1000  # how long `end` waits at a barrier that the others have left


class SaveWaits:
    """JAX's client of the coordination service, as orbax uses it, and what threads of this process wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._barriers: list[str] = []
        self._ended = 0  # how often `end` was called

    def barriers(self) -> list[str]:
        """The keys of the barriers at which threads of this process wait."""
        with self._lock:
            return list(self._barriers)

    def end(self, barriers: Collection[str]) -> None:
        """Fail those of `barriers` at which this process does not wait, and its own waits for values."""
        self._ended += 1
        for key in sorted(set(barriers)):
            if key in self.barriers():
                continue
            # The service counts how often each process has come to a barrier: every process comes once.
            with suppress(jax.errors.JaxRuntimeError):  # it fails, as intended
                _jax_client().wait_at_barrier(key, _JOIN_MILLISECONDS, process_ids=[jax.process_index()])

    def wait_at_barrier(self, key: str, timeout_in_ms: int, process_ids: Sequence[int] | None = None) -> None:
        error = sys.exc_info()[1]
        if error is not None and threading.current_thread().name == _LAST_THREAD:
            raise error  # the save has failed: orbax calls this in a `finally`
        with self._lock:
            self._barriers.append(key)
        try:
            _jax_client().wait_at_barrier(key, timeout_in_ms, process_ids=process_ids)
        finally:
            with self._lock:
                self._barriers.remove(key)

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        deadline, ended = time.monotonic() + timeout_in_ms / 1000, self._ended
        while True:
            wait = min(max(deadline - time.monotonic(), 0.0), _POLL_SECONDS)
            try:
                return _jax_client().blocking_key_value_get(key, int(1000 * wait))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error) or wait < _POLL_SECONDS or self._ended > ended:
                    raise

    def __getattr__(self, name: str) -> Any:
        return getattr(_jax_client(), name)


SAVE_WAITS = SaveWaits()
_jax_client: Any = None  # orbax's function that returns JAX's client


def _install() -> None:
    """Replace JAX's client in orbax by `SAVE_WAITS`."""
    global _jax_client
    try:
        from orbax.checkpoint._src.futures.signaling_client import get_signaling_client
        from orbax.checkpoint._src.multihost import multihost

        _jax_client, forget = multihost.get_jax_distributed_client, get_signaling_client.cache_clear
    except (ImportError, AttributeError):
        return

    def client() -> SaveWaits:
        _jax_client()  # raises ValueError if there is none
        return SAVE_WAITS

    multihost.get_jax_distributed_client = client
    forget()  # what holds JAX's client


_install()
