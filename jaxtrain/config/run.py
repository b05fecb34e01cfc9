"""The tree of a run: all sections, and what must fit together between them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from jaxtrain.config.rl import RLSection
from jaxtrain.config.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    Section,
    TrainSection,
)


class RunConfig(Section):
    recipe: Literal["sft", "rl"]
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()
    rl: RLSection | None = None  # with `recipe: rl`

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.steps={self.train.steps}"
            )
        if self.eval.generate and self.data.eval is None:
            raise ValueError("eval.generate needs data.eval")
        if (self.recipe == "rl") != (self.rl is not None):
            raise ValueError("`recipe: rl` and the section `rl` belong together")
        if self.rl is not None and self.rl.max_completion_length >= self.data.max_length:
            raise ValueError(
                f"rl.max_completion_length={self.rl.max_completion_length} leaves no room for a prompt in "
                f"data.max_length={self.data.max_length}"
            )
        return self
