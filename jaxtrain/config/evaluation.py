"""The section `eval`: what is measured on held-out data while a run trains, and what follows from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from jaxtrain.config.data import Sources
from jaxtrain.config.marks import MAY_CHANGE
from jaxtrain.config.rl_parts import RewardSection
from jaxtrain.config.sections import NonNegativeInt, Section


class BestSection(Section):
    """The checkpoint with the best value of a metric is kept beside the newest ones: `jaxtrain export --best`."""

    metric: str
    """Of an evaluation, such as eval_loss."""
    mode: Literal["min", "max"]
    """Whether the smallest or the largest value is best."""
    patience: PositiveInt | None = None
    """The run ends after so many evaluations in a row without a better value."""
    target: float | None = None
    """The run ends once the metric is as good as this."""


class EvalSection(Section):
    every: Annotated[PositiveInt, MAY_CHANGE] = 500
    """Steps between evaluations."""
    batches: PositiveInt | None = None
    """Of train.batch_size rows of each source; default: all of data.eval."""
    generate: NonNegativeInt = 0
    """Held-out prompts to answer."""
    prompts: Sources | None = None
    """Rows with these prompts; default: those of data.eval."""
    max_new_tokens: PositiveInt = 64
    """Tokens of an answer, at most."""
    samples: PositiveInt = 1
    """Answers to each prompt."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the answers; 0: greedy."""
    greedy: bool = False
    """One greedy answer to each prompt as well, beside those at a temperature."""
    rewards: list[RewardSection] = Field(default_factory=list)
    """What judges the answers; default: whether they are equal to the data's (recipe rl: rl.rewards)."""
    best: BestSection | None = None
    """Keeps the checkpoint with the best value of a metric."""

    @model_validator(mode="after")
    def _answers(self) -> EvalSection:
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples={self.samples} at temperature=0 would all be equal: give a temperature")
        if self.greedy and not self.temperature:
            raise ValueError("greedy=true has no effect at temperature=0, where all answers are greedy")
        given = {"prompts": self.prompts, "rewards": self.rewards, "temperature": self.temperature}
        if not self.generate and (unused := [name for name, value in given.items() if value]):
            raise ValueError(f"{unused[0]} has no effect without `generate`")
        return self

    @property
    def prompt_sources(self) -> list:
        """None at all where `data.eval` has the prompts."""
        return self.prompts if isinstance(self.prompts, list) else [] if self.prompts is None else [self.prompts]
