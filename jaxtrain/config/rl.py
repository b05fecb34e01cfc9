"""The `rl:` section: what is sampled, how it is scored, and how it is learned from."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, PositiveFloat, PositiveInt, model_validator

from jaxtrain.config.dataclass_sections import ALGORITHM, resolve_algorithm
from jaxtrain.config.marks import MAY_CHANGE
from jaxtrain.config.rl_parts import EnvironmentSection, PlacementSection, RewardModelSection, RewardSection
from jaxtrain.config.sections import NonNegativeInt, Section

AlgorithmSection = Annotated[Any, ALGORITHM, BeforeValidator(resolve_algorithm), PlainSerializer(ALGORITHM.section)]


class CriticSection(Section):
    """PPO's value model, which begins as the policy's checkpoint. What is not here is the policy's."""

    learning_rate: PositiveFloat = 1e-5
    """Of the critic."""
    epsilon: PositiveFloat = 0.2
    """How far a value may move from the old one in a step."""


class RLSection(Section):
    algorithm: AlgorithmSection = Field(default="grpo", validate_default=True)
    """grpo dr_grpo dapo gspo rloo reinforce++ cispo sapo vespo gdpo ppo; with a teacher: on_policy_distillation
    gkd gold uld; or a custom file.py:NAME; or a mapping of its name and other numbers: {name: ..., FIELD: VALUE
    ...}."""
    prompts: PositiveInt = 8
    """Prompts of a step."""
    generations: PositiveInt = 8
    """Samples of a prompt."""
    max_completion_length: PositiveInt = 512
    """Tokens of a sample, at most."""
    iterations: PositiveInt = 1
    """Passes over a step's samples."""
    minibatches: PositiveInt = 1
    """Updates of a pass."""
    slots: Annotated[PositiveInt, MAY_CHANGE] = 64
    """Samples that are generated at the same time."""
    support: PositiveInt = 64
    """Where `sampling` filters: tokens kept at most, among which the trainer scores the sample."""
    critic: CriticSection = CriticSection()
    """PPO's value model."""
    rewards: list[RewardSection] = Field(default_factory=list)
    """Functions that score samples; their weighted sum is the reward."""
    reward_workers: Annotated[PositiveInt, MAY_CHANGE] = 2
    """Processes that run the rewards."""
    reward_models: list[RewardModelSection] = Field(default_factory=list)
    """Models that score samples, in the same sum."""
    environment: EnvironmentSection | None = None
    """What answers the model in conversations of several turns."""
    placement: PlacementSection = PlacementSection()
    """Which devices sample and which train."""
    print_samples: Annotated[NonNegativeInt, MAY_CHANGE] = 50
    """Steps between tables of samples on the terminal; 0: none."""

    @property
    def updates(self) -> int:
        """Optimizer steps on one step's samples."""
        return self.iterations * self.minibatches

    @property
    def scorers(self) -> int:
        """Groups that are scored at the same time beside the training: one by each process that runs the rewards, or
        all together by reward models, which are faster so."""
        return self.reward_workers if self.placement.staleness and self.rewards and not self.reward_models else 1

    @property
    def rewarded(self) -> bool:
        """Whether samples have rewards from anything but a teacher."""
        return bool(self.rewards or self.reward_models or self.environment)

    @model_validator(mode="after")
    def _fits_together(self) -> RLSection:
        algorithm = self.algorithm
        if not self.rewarded and not algorithm.needs_teacher:
            raise ValueError("samples have no reward: give `rewards`, `reward_models` or an `environment`")
        if not self.rewarded and algorithm.max_refills:
            raise ValueError(
                f"algorithm.max_refills={algorithm.max_refills}: dynamic sampling replaces groups whose rewards are "
                "all equal, and there are no rewards: use max_refills=0"
            )
        if algorithm.advantages is None and (self.rewards or self.reward_models):
            raise ValueError(
                f"algorithm {algorithm.name} reads no rewards: leave `rewards` and `reward_models` out; eval.rewards "
                "judge held-out answers"
            )
        names = Counter(reward.name for reward in [*self.rewards, *self.reward_models])
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two rewards are named {twice[0]!r}: metrics and weights identify them by their name")
        if self.prompts % self.minibatches:
            raise ValueError(f"prompts={self.prompts} is not a multiple of minibatches={self.minibatches}")
        if not algorithm.critic and self.critic != CriticSection():
            raise ValueError(
                f"critic: algorithm {algorithm.name} has none; of the built-in algorithms only ppo has one"
            )
        return self
