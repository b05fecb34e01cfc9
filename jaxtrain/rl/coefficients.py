"""`Coefficients`: beta and the entropy coefficient of the next rollout, where a target moves them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from jaxtrain.objectives.policy import PolicyObjective
from jaxtrain.rl.algorithms import TeacherObjective

_GAIN, _LARGEST_ERROR = 0.1, 0.2  # of Ziegler et al. 2019, section 2.2


@dataclass
class Coefficients:
    """They are part of a checkpoint, since they depend on all rollouts before."""

    beta: float
    entropy: float

    @classmethod
    def initial(cls, objective: PolicyObjective | TeacherObjective) -> Coefficients:
        if isinstance(objective, TeacherObjective):
            return cls(0.0, 0.0)  # which has neither
        return cls(objective.beta, objective.entropy_coefficient)

    def update(self, objective: PolicyObjective, kl: float, entropy: float) -> None:
        """Move them by the means over the tokens of a rollout: of the KL estimate, and the entropy in nats.

        With `kl_target`, beta *= 1 + 0.1 clip(kl / kl_target - 1, -0.2, 0.2): Ziegler et al. 2019 (arXiv:1909.08593),
        equation 4. With `entropy_step`, the entropy coefficient grows by it where the entropy is at most the target,
        else it falls, within [0, entropy_max]: He et al. 2025, Skywork Open Reasoner 1 (arXiv:2505.22312).
        """
        if objective.kl_target is not None:
            error = kl / objective.kl_target - 1
            self.beta *= 1 + _GAIN * min(max(error, -_LARGEST_ERROR), _LARGEST_ERROR)
        if objective.entropy_target is not None and objective.entropy_step:
            step = objective.entropy_step if entropy <= objective.entropy_target else -objective.entropy_step
            self.entropy = min(max(self.entropy + step, 0.0), objective.entropy_max)

    def get_state(self) -> dict[str, float]:
        return asdict(self)

    def set_state(self, state: dict[str, float]) -> None:
        self.beta, self.entropy = state["beta"], state["entropy"]
