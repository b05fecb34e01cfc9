"""Reinforcement learning: what users write themselves (environments, tools, algorithms)."""

from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain.rl.advantages import Advantages as Advantages
    from jaxtrain.rl.advantages import Outcomes as Outcomes
    from jaxtrain.rl.algorithms import ALGORITHMS as ALGORITHMS
    from jaxtrain.rl.algorithms import Algorithm as Algorithm
    from jaxtrain.rl.environments import Environment as Environment
    from jaxtrain.rl.environments import Opening as Opening
    from jaxtrain.rl.environments import Reply as Reply
    from jaxtrain.rl.rollouts import Prompt as Prompt
    from jaxtrain.rl.rollouts import Trajectory as Trajectory
    from jaxtrain.rl.tools import Tools as Tools

_WHERE = {
    "Environment": "jaxtrain.rl.environments:Environment",
    "Opening": "jaxtrain.rl.environments:Opening",
    "Reply": "jaxtrain.rl.environments:Reply",
    "Tools": "jaxtrain.rl.tools:Tools",
    "Algorithm": "jaxtrain.rl.algorithms:Algorithm",
    "ALGORITHMS": "jaxtrain.rl.algorithms:ALGORITHMS",
    "Outcomes": "jaxtrain.rl.advantages:Outcomes",
    "Advantages": "jaxtrain.rl.advantages:Advantages",
    "Prompt": "jaxtrain.rl.rollouts:Prompt",
    "Trajectory": "jaxtrain.rl.rollouts:Trajectory",
}

__all__ = [
    "ALGORITHMS",
    "Advantages",
    "Algorithm",
    "Environment",
    "Opening",
    "Outcomes",
    "Prompt",
    "Reply",
    "Tools",
    "Trajectory",
]

__getattr__ = lazy(__name__, _WHERE)
