"""The tree of a run: all sections, and what must fit together between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from jaxtrain.config.marks import MAY_CHANGE
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

# Keys that mean nothing to `recipe: rl`, and what does instead.
_NOT_FOR_RL = {
    "train.batch_size": "rl.prompts x rl.generations samples make a step",
    "data.overlong": "a prompt that is too long is a bad row: data.on_bad_row",
    "data.loss_on": "what the model writes is trained on",
    "data.packing": "samples are always packed",
    "data.packing_bins": "samples are always packed as densely as they can be",
    "data.virtual_shards": "one process reads all prompts",
    "data.workers": "one thread reads the prompts",
    "eval.batches": "eval.generate is the number of held-out prompts",
}


class RunConfig(Section):
    recipe: Literal["sft", "rl"]
    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    mesh: Annotated[MeshSection, MAY_CHANGE] = MeshSection()
    checkpoint: Annotated[CheckpointSection, MAY_CHANGE] = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: Annotated[LogSection, MAY_CHANGE] = LogSection()
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
        for section, names in self.unused.items():
            for name in names & getattr(self, section).model_fields_set:
                raise ValueError(f"recipe rl has no {section}.{name}: {_NOT_FOR_RL[f'{section}.{name}']}")
        if self.recipe == "sft" and self.train.batch_size % self.train.microbatches:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} is no multiple of "
                f"train.microbatches={self.train.microbatches}"
            )
        if self.rl is not None and self.model.lora is not None and self.model.lora.dropout:
            raise ValueError(
                f"model.lora.dropout={self.model.lora.dropout} must be 0 with recipe rl: the sampler and the old "
                "log-probabilities are without dropout, so that the first update would not have a ratio of 1"
            )
        if self.rl is not None and self.rl.max_completion_length >= self.data.max_length:
            raise ValueError(
                f"rl.max_completion_length={self.rl.max_completion_length} leaves no room for a prompt in "
                f"data.max_length={self.data.max_length}"
            )
        return self

    @property
    def unused(self) -> dict[str, set[str]]:
        """Section -> the keys of it that the recipe has no use for; giving one is a mistake."""
        unused: dict[str, set[str]] = {}
        for key in _NOT_FOR_RL if self.recipe == "rl" else ():
            section, _, name = key.partition(".")
            unused.setdefault(section, set()).add(name)
        return unused
