"""The sections of what a run writes: checkpoints and metrics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxtrain.config.sections import Section


class CheckpointSection(Section):
    every: PositiveInt = 500
    """Steps."""
    minutes: PositiveFloat | None = None
    """And after the step at which so many have passed since the last one."""
    keep: PositiveInt = 2
    """The newest."""
    keep_every: PositiveInt | None = None
    """And those of multiples of so many steps, a multiple of `every`."""

    @model_validator(mode="after")
    def _keeps_what_is_saved(self) -> CheckpointSection:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(f"keep_every={self.keep_every} is not a multiple of every={self.every}")
        return self


class LogSection(Section):
    every: PositiveInt = 10
    """Steps between lines of metrics."""
    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=["tensorboard"])
    """What shows the metrics besides metrics.jsonl and report.html; all but tensorboard need the extra of that name."""
    profile: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """[step, steps]: the first step that is traced, and how many; into profile/ of the run's folder."""
