"""Algorithms as rows: an advantage estimator, an objective, and how samples are collected.

A row of your own is an `Algorithm` in a file of yours, named in the config as `rl.algorithm: my_file.py:MINE`; its
estimator and its objective are yours or the ready ones of `rl.advantages` and `objectives.policies`.
"""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import NonNegativeFloat

from jaxtrain.config.sections import Fraction, NonNegativeInt
from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.distill import Distill
from jaxtrain.objectives.gold import GOLD
from jaxtrain.objectives.policies import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    SAPO,
    VESPO,
    ClippedPolicy,
    DrGRPO,
    ReinforcePlusPlus,
)
from jaxtrain.objectives.policy import PolicyObjective
from jaxtrain.objectives.uld import ULD
from jaxtrain.rl.advantages import (
    Estimator,
    Settings,
    gae,
    globally_normalised,
    group_centred,
    group_normalised,
    leave_one_out,
    separately_normalised,
)
from jaxtrain.types import GROUP_PLACE

TeacherObjective = Distill | ULD | GOLD  # compare distributions with a teacher's

# Which of the ready estimators read a number. One of the user's own may read all of them.
_READERS: dict[str, tuple[Estimator, ...]] = {
    "gamma": (gae, globally_normalised),
    "lam": (gae,),
    "bootstrap": (gae,),
    "scale": (group_normalised,),
}
_OF_ADVANTAGES = (*_READERS, "overlong_cache", "teacher_coefficient", "teacher_discount")
_ESTIMATORS = (gae, globally_normalised, group_centred, group_normalised, leave_one_out, separately_normalised)


@dataclass(frozen=True)
class Algorithm(Checked):
    """What distinguishes one algorithm from another. A config may change the numbers, in `rl.algorithm`, and those of
    the objective, in `objective`."""

    advantages: Estimator | None  # None: the objective is a divergence from a teacher, which needs none
    objective: PolicyObjective | TeacherObjective = field(default_factory=GRPO)
    max_refills: NonNegativeInt = 0  # dynamic sampling: how often groups that are all alike are replaced by others
    overlong_filter: bool = False  # samples that were cut off carry no loss
    overlong_cache: Fraction = 0.0  # soft punishment over this last share of max_completion_length; 0: none
    critic: bool = False
    gamma: Fraction = 1.0  # discount of the advantage estimator
    lam: Fraction = 0.95
    bootstrap: bool = False  # a sample that was cut off goes on: the critic's value of the state after it is added
    scale: Literal["group", "batch"] = "group"  # of which rewards the std is that divides an advantage
    # of the teacher's term log q - log p, which is added to every token's advantage; 0: there is no teacher
    teacher_coefficient: NonNegativeFloat = 0.0
    teacher_discount: Fraction = 0.0  # of the terms of later tokens in that of a token; 0: its own alone
    name: str = ""  # that it has in a config

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.advantages is None) != isinstance(self.objective, TeacherObjective):
            raise ValueError("Distill, ULD and GOLD have no advantages, and every other objective needs them")
        if self.critic and self.needs_teacher:
            raise ValueError("critic: its returns do not include the teacher's terms: name an algorithm without one")
        if isinstance(self.objective, TeacherObjective) and self.objective.ce_weight:
            raise ValueError(
                f"objective.ce_weight={self.objective.ce_weight} must be 0: the cross-entropy of the student's own "
                "samples has an expected gradient of 0"
            )
        if self.kl_in_reward and self.advantages is separately_normalised:
            raise ValueError("kl_in=reward: GDPO normalises each reward, which the KL is none of: use kl_in=loss")

    @property
    def without_effect(self) -> dict[str, str]:
        """The numbers that change nothing -> why."""
        if self.advantages is None:
            return dict.fromkeys(_OF_ADVANTAGES, "the objective is a divergence, which has no advantages")
        without = {} if self.teacher_coefficient else {"teacher_discount": "teacher_coefficient is 0"}
        if self.advantages not in _ESTIMATORS:
            return without
        return without | {
            number: f"only {' and '.join(reader.__name__ for reader in readers)} read{'s' * (len(readers) == 1)} it"
            for number, readers in _READERS.items()
            if self.advantages not in readers
        }

    @property
    def needs_teacher(self) -> bool:
        return self.advantages is None or self.teacher_coefficient != 0

    @property
    def aligns(self) -> bool:
        """Whether the objective compares groups of tokens with a teacher's, which has another tokenizer."""
        return GROUP_PLACE in self.objective.signals

    @property
    def needs_reference(self) -> bool:
        return isinstance(self.objective, PolicyObjective) and self.objective.beta != 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether a KL penalty is part of the reward."""
        return isinstance(self.objective, PolicyObjective) and self.needs_reference and self.objective.kl_in == "reward"

    @property
    def zeros_have_no_gradient(self) -> bool:
        """Whether the advantages follow from the rewards alone, and those that are 0 make the gradient 0."""
        objective = self.objective
        if not isinstance(objective, PolicyObjective) or not objective.zeros_have_no_gradient:
            return False
        return not (self.critic or self.kl_in_reward or self.needs_teacher)

    @property
    def settings(self) -> Settings:
        return Settings(self.gamma, self.lam, self.scale)


ALGORITHMS = {
    "grpo": Algorithm(group_normalised, GRPO()),
    "dr_grpo": Algorithm(group_centred, DrGRPO()),
    # The punished share is the paper's 4096 of 20480 tokens.
    "dapo": Algorithm(group_normalised, DAPO(), max_refills=3, overlong_filter=True, overlong_cache=0.2),
    "gspo": Algorithm(group_normalised, GSPO()),
    "rloo": Algorithm(leave_one_out, RLOO()),
    "reinforce++": Algorithm(globally_normalised, ReinforcePlusPlus()),
    "cispo": Algorithm(group_normalised, CISPO()),
    "sapo": Algorithm(group_normalised, SAPO()),
    "vespo": Algorithm(group_normalised, VESPO()),
    "gdpo": Algorithm(separately_normalised, GRPO()),
    "ppo": Algorithm(gae, PPO(), critic=True),
    # "On-Policy Distillation", Thinking Machines 2025; the advantages of rewards, if any are given, are Dr. GRPO's
    "on_policy_distillation": Algorithm(group_centred, ClippedPolicy(), teacher_coefficient=1.0),
    # Generalised Knowledge Distillation on the student's samples alone, Agarwal et al. 2023 (arXiv:2306.13649)
    "gkd": Algorithm(None, Distill(kind="jsd")),
    # As gkd, with a teacher of another tokenizer: Patiño et al. 2025, and Boizard et al. 2024 (arXiv:2402.12030)
    "gold": Algorithm(None, GOLD()),
    "uld": Algorithm(None, ULD(ce_weight=0.0)),
}
