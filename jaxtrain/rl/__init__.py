"""Reinforcement learning: the interfaces of custom environments, tools and algorithms."""

from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain.rl.advantages import Advantages, Outcomes
    from jaxtrain.rl.algorithms import ALGORITHMS, Algorithm
    from jaxtrain.rl.environments import Environment, Opening, Reply
    from jaxtrain.rl.rollouts import Prompt, Trajectory
    from jaxtrain.rl.tools import Tools

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

__getattr__, __dir__ = lazy(__name__, _WHERE)
