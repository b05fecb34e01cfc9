"""Sections of `rl:` about the world around the policy: rewards, environment, placement."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxtrain.config.marks import IN_HOME, INPUT_PATH, MAY_CHANGE
from jaxtrain.config.python_values import Given, import_path
from jaxtrain.config.sections import NonNegativeInt, Section


class RewardSection(Section):
    function: Given
    """package.module:name, file.py:name, a ready one of jaxtrain.rl.rewards by its bare name, or a function: one
    that is named runs in processes that can be killed, one that is given in the process that trains."""
    weight: float = 1.0
    """In the sum of rewards."""
    seconds: PositiveFloat = 30.0
    """The limit of one call."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further keywords for the function."""

    @property
    def name(self) -> str:
        """What metrics call it."""
        return import_path(self.function).rpartition(":")[2].rpartition(".")[2]


class RewardModelSection(Section):
    path: Annotated[str, INPUT_PATH, IN_HOME]
    """A Hugging Face folder of a reward model with the policy's tokenizer."""
    name: str = "reward_model"
    """What metrics call it."""
    weight: float = 1.0
    """In the sum of rewards."""


class EnvironmentSection(Section):
    factory: Given
    """package.module:name, file.py:name, a ready one of jaxtrain.rl.environments by its bare name, or the class
    itself."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keywords for the factory."""
    weight: float = 1.0
    """Of the environment's own rewards, beside those of rl.rewards."""
    max_turns: PositiveInt = 8
    """The model's turns of a conversation, at most."""
    max_tokens: PositiveInt | None = None
    """Of a conversation, prompt and environment included; default: what fits."""
    seconds: PositiveFloat = 30.0
    """The limit of one reset or step."""

    def max_length(self, row_length: int) -> int:
        """Tokens of a conversation that is packed into rows of `row_length`."""
        return min(self.max_tokens or row_length, row_length)


class PlacementSection(Section):
    kind: Annotated[Literal["colocated", "disjoint", "ray"], MAY_CHANGE] = "colocated"
    """colocated: all devices sample and train in turn; disjoint: some sample and the others train; ray: workers of
    a Ray cluster sample."""
    rollout_devices: Annotated[PositiveInt | None, MAY_CHANGE] = None
    """disjoint: this many of the devices of each process sample, the others train."""
    processes_per_engine: Annotated[PositiveInt, MAY_CHANGE] = 1
    """colocated: this many adjacent processes of the run sample together with one engine, for models that do not
    fit one."""
    workers: Annotated[PositiveInt, MAY_CHANGE] = 1
    """ray: processes that sample."""
    worker_seconds: Annotated[PositiveFloat, MAY_CHANGE] = 600.0
    """ray: a worker that takes longer to receive weights, or to finish another sample, is given up."""
    resources: Annotated[dict[str, float], MAY_CHANGE] = Field(default_factory=dict)
    """ray: what a worker asks of the cluster, e.g. {GPU: 1}."""
    memory: Annotated[Literal["kept", "phased"], MAY_CHANGE] = "kept"
    """phased, with colocated: the optimizer's state is in the host's memory during sampling, and the engine's weights
    and cache are freed during updates."""
    staleness: NonNegativeInt = 0
    """Optimizer steps that the weights with which a sample begins may lie behind; 0: on policy."""

    @model_validator(mode="after")
    def _fits_together(self) -> PlacementSection:
        if (self.rollout_devices is None) == (self.kind == "disjoint"):
            raise ValueError(f"kind={self.kind} with rollout_devices={self.rollout_devices}: they belong to `disjoint`")
        if self.kind != "colocated" and self.processes_per_engine > 1:
            raise ValueError(
                f"processes_per_engine={self.processes_per_engine} belongs to kind=colocated, and this is "
                f"kind={self.kind}"
            )
        if self.memory == "phased" and (self.kind != "colocated" or self.staleness):
            raise ValueError(
                f"memory=phased needs kind=colocated and staleness=0, where sampling and updates take turns on the "
                f"same devices; this is kind={self.kind}, staleness={self.staleness}"
            )
        for key in ("workers", "worker_seconds", "resources") if self.kind != "ray" else ():
            if getattr(self, key) != PlacementSection.model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}={getattr(self, key)} belongs to kind=ray, and this is kind={self.kind}")
        return self
