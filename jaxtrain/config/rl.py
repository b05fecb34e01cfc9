"""The `rl:` section: what is sampled, how it is scored, and how it is learned from."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxtrain.config.rollouts import EnvironmentSection, PlacementSection, RewardModelSection, RewardSection
from jaxtrain.config.sections import Fraction, NonNegativeInt, Section

NonNegativeFloat = Annotated[float, Field(ge=0)]


class SamplingSection(Section):
    temperature: PositiveFloat = 1.0  # also divides the trainer's logits, so that both speak of one distribution
    top_k: NonNegativeInt = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Fraction = 0.0
    support: PositiveInt = 64  # with a filter: tokens kept at most, among which the trainer scores the sample
    slots: PositiveInt = 64  # samples in flight

    @property
    def filtered(self) -> bool:
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingSection:
        if self.top_k > self.support:
            raise ValueError(
                f"top_k={self.top_k} is more than support={self.support}, the number of tokens that the trainer scores "
                "a sample among: raise support, or lower top_k"
            )
        return self


class CorrectionSection(Section):
    """Of the gap between the sampler's and the trainer's probabilities, by importance weights."""

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    cap: PositiveFloat = 2.0


class CriticSection(Section):
    """PPO's value model, which begins as the policy's checkpoint. What is not here is the policy's."""

    learning_rate: PositiveFloat = 1e-5
    epsilon: PositiveFloat = 0.2  # how far a value may move from the old one in a step


class RLSection(Section):
    algorithm: str = "grpo"  # grpo dr_grpo dapo gspo rloo reinforce++ cispo ppo, or file.py:NAME of your own
    prompts: PositiveInt = 8  # of a step
    generations: PositiveInt = 8  # samples of a prompt
    max_completion_length: PositiveInt = 512  # tokens
    iterations: PositiveInt = 1  # passes over a step's samples
    minibatches: PositiveInt = 1  # updates of a pass
    sampling: SamplingSection = SamplingSection()
    correction: CorrectionSection | None = CorrectionSection()
    critic: CriticSection = CriticSection()
    rewards: list[RewardSection] = Field(default_factory=list)
    reward_workers: PositiveInt = 2  # processes that run the rewards
    reward_models: list[RewardModelSection] = Field(default_factory=list)
    environment: EnvironmentSection | None = None
    placement: PlacementSection = PlacementSection()
    print_samples: NonNegativeInt = 50  # steps between tables of samples on the terminal; 0: none
    # The numbers of the algorithm; what is not given is the algorithm's own (`jaxtrain/rl/algorithms.py`).
    aggregation: Literal["grpo", "bnpo", "dr_grpo", "dapo", "sum"] | None = None
    beta: NonNegativeFloat | None = None  # of the KL to the reference; 0 needs no reference
    kl: Literal["k1", "k2", "k3"] | None = None
    kl_in: Literal["loss", "reward"] | None = None
    kl_bias_correction: bool | None = None  # KL in the loss: weighed by p / p_old (TRL's use_bias_correction_kl)
    epsilon_low: NonNegativeFloat | None = None
    epsilon_high: NonNegativeFloat | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_coefficient: NonNegativeFloat | None = None  # of an entropy bonus in the loss
    entropy_target: PositiveFloat | None = None  # nats; the coefficient falls to 0 as the entropy rises to it
    gamma: Fraction | None = None
    lam: Fraction | None = None
    max_refills: NonNegativeInt | None = None  # dynamic sampling: rounds that replace groups whose rewards are alike
    overlong_filter: bool | None = None  # samples that were cut off carry no loss
    overlong_cache: Fraction | None = None  # soft punishment over this last share of max_completion_length

    @property
    def updates(self) -> int:
        """Optimizer steps on one step's samples."""
        return self.iterations * self.minibatches

    @model_validator(mode="after")
    def _fits_together(self) -> RLSection:
        if not self.rewards and not self.reward_models and self.environment is None:
            raise ValueError("nothing says what a sample is worth: give `rewards`, `reward_models` or an `environment`")
        names = Counter(reward.name for reward in [*self.rewards, *self.reward_models])
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two rewards are named {twice[0]!r}: metrics and weights tell them by their name")
        if self.prompts % self.minibatches:
            raise ValueError(f"prompts={self.prompts} is no multiple of minibatches={self.minibatches}")
        if self.placement.staleness and self.correction is None:
            raise ValueError(
                f"placement.staleness={self.placement.staleness} needs `correction`: nothing else bounds the weight of "
                "samples drawn from older weights (the clip is around the trainer's own log-probabilities)"
            )
        return self
