"""How often, and for how many seconds, a thread has compiled: counted by JAX's own events."""

from __future__ import annotations

import threading
from typing import Any

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also of a program that the persistent cache had
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # the compiler begins then
_PARTS = ("/jax/core/compile/jaxpr_trace_duration", _LOWERED, _COMPILED)
_MAX_SPANS = 1000
_compiling: set[int] = set()  # threads that are in the compiler


class Compilations(threading.local):
    """Those of the thread that reads it: the number of programs, and the seconds of tracing and compiling."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []  # that were counted, disjoint and in order

    def add(self, event: str, start: float, end: float) -> None:
        self.count += event == _COMPILED
        while self._spans and self._spans[-1][0] >= start:  # a function that was traced within this one
            inner = self._spans.pop()
            self.seconds -= inner[1] - inner[0]
        self._spans.append((start, end))
        self.seconds += end - start
        del self._spans[:-_MAX_SPANS]


COMPILATIONS = Compilations()


def compilations() -> int:
    """How many programs this thread has compiled, or found in the persistent cache, since JAX counts."""
    return COMPILATIONS.count


def is_compiling(thread: int) -> bool:
    """Whether the thread of that `threading.get_ident` is in the compiler now."""
    return thread in _compiling


def _on_span(event: str, start_time: float, end_time: float, **_: Any) -> None:
    if event == _LOWERED:
        _compiling.add(threading.get_ident())
    elif event == _COMPILED:
        _compiling.discard(threading.get_ident())
    if event in _PARTS:
        COMPILATIONS.add(event, start_time, end_time)


jax.monitoring.register_event_time_span_listener(_on_span)
