"""The critic's objective."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float
from pydantic import PositiveFloat

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.objective import ScoreRequest, Value
from jaxtrain.types import Array, Batch, Mean, Metric, Norm, Scores


@dataclass(frozen=True)
class ClippedValue(Checked):
    """Half the larger squared error of a value and of the value within `epsilon` of the old one, mean over tokens.

    The clipped value loss of OpenAI's PPO (Schulman et al. 2017, arXiv:1707.06347; as analysed in Huang et al. 2022,
    "The 37 Implementation Details of Proximal Policy Optimization", number 9). Signals: `values` before the first
    update, and `returns`.
    """

    epsilon: PositiveFloat  # rl.critic.epsilon has the default

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return (Value(),)

    @property
    def signals(self) -> tuple[str, ...]:
        return "values", "returns"

    @property
    def separable(self) -> bool:
        return True

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Metric]]:
        weights, old, returns = batch.loss_weights, batch.signals["values"], batch.signals["returns"]
        near = jnp.clip(scores.value, old - self.epsilon, old + self.epsilon)
        error, error_near = (scores.value - returns) ** 2, (near - returns) ** 2
        total = 0.5 * jnp.sum(jnp.maximum(error, error_near) * weights)
        count = jnp.sum(weights)
        metrics: dict[str, Metric] = {
            "value_loss": Mean(total, count),
            "value_clip_ratio": Mean(jnp.sum((error_near > error) * weights), count),
            "values": Mean(jnp.sum(scores.value * weights), count),
        }
        return total / jnp.maximum(norm.tokens, 1), metrics
