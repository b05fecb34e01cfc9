"""The metrics of a run over its steps, read from its metrics.jsonl. Does not import JAX."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtrain.observe.run_files import METRICS

STD_ERROR = "_std_error"  # what the name of a metric's standard error ends with, beside the metric
_LOWER = ("loss", "perplexity", "error", "kl")
_NEITHER, _NEITHER_AT_THE_START = ("std", "lost", "signal"), ("time", "data/", "sampling/")
_HIGHER = ("reward", "accuracy", "exact_match", "pass@", "maj@", "margin")


class Series(NamedTuple):
    """One metric."""

    steps: list[int]
    values: list[float]  # finite ones

    def best(self, mode: Literal["min", "max"]) -> tuple[int, float]:
        """The first step with the best value, and that value."""
        value = (min if mode == "min" else max)(self.values)
        return self.steps[self.values.index(value)], value


def read_series(run: Path) -> dict[str, Series]:
    """Every metric of the run in a folder, in the order of their first values. An incomplete last line is left out."""
    found: dict[str, Series] = {}
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    for line in lines:
        if not line.endswith("\n"):
            continue
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                series = found.setdefault(name, Series([], []))
                series.steps.append(step)
                series.values.append(value)
    return found


def better(name: str) -> Literal["min", "max"] | None:
    """Whether the smaller or the larger value of a metric is better, by its name; None if that is not known."""
    last = name.rpartition("/")[2] if not name.startswith("eval_rewards/") else f"reward_{name}"
    if name.startswith(_NEITHER_AT_THE_START) or any(word in last for word in _NEITHER):
        return None
    if any(word in last for word in _HIGHER):
        return "max"
    return "min" if any(word in last for word in _LOWER) else None
