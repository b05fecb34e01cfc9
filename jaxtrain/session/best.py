"""The best evaluation of a run, whose checkpoint is kept, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.config.evaluation import BestSection


class BestEvaluation:
    """The step and the value of the best evaluation so far, by `eval.best`; nothing without that section."""

    def __init__(self, section: BestSection | None):
        self._section = section
        self.step: int | None = None
        self.value: float | None = None
        self._since = 0  # evaluations since the best one

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of an evaluation after `step`. A value that is not finite is never the best, nor is one that
        is missing: a reward that failed for all answers has none.

        Raises ValueError if the metric is missing and no evaluation before had it.
        """
        if self._section is None:
            return
        name = self._section.metric
        if name not in metrics and self.value is None:
            raise ValueError(f"eval.best.metric={name} is no metric of an evaluation: {', '.join(metrics) or 'none'}")
        value, self._since = metrics.get(name, math.nan), self._since + 1
        sign = 1 if self._section.mode == "min" else -1
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            self.step, self.value, self._since = step, value, 0

    @property
    def ends_run(self) -> bool:
        """Whether `target` is reached, or `patience` evaluations in a row were no better."""
        patience = self._section.patience if self._section else None
        return self._reached or (patience is not None and self._since >= patience)

    @property
    def _reached(self) -> bool:
        target = self._section.target if self._section else None
        if self._section is None or target is None or self.value is None:
            return False
        return self.value <= target if self._section.mode == "min" else self.value >= target

    @property
    def reason(self) -> str:
        """Why the run ends early."""
        assert self._section is not None
        if self._reached:
            return f"{self._section.metric} reached {self.value:.4g} (eval.best.target={self._section.target:g})"
        return (
            f"{self._section.metric} was not better than {self.value:.4g} of step {self.step} in "
            f"{self._section.patience} evaluations"
        )

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"step": self.step, "value": self.value, "since": self._since}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        if state:
            self.step, self.value, self._since = state["step"], state["value"], state["since"]
