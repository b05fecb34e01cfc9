"""Distillation from a teacher with another tokenizer: the distance of sorted probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.objective import Correct, Entropy, Logp, ScoreRequest, TopLogps, weighted_mean
from jaxtrain.objectives.segments import group_probs
from jaxtrain.types import GROUP_PLACE, TEACHER_PROBS, Array, Batch, Mean, Norm, Scores


@dataclass(frozen=True, kw_only=True)
class ULD(Checked):
    """divergence_weight * ULD(teacher, student) + ce_weight * cross-entropy, over the weighted tokens.

    ULD is the Universal Logit Distillation of Boizard et al. 2024 (arXiv:2402.12030): of the probabilities p of the
    student and q of the teacher, each in descending order,

        sum over the ranks i of |p_(i) - q_(i)|

    which needs no token to mean the same to both. As in GOLD (Patiño et al. 2025, Hugging Face), p and q belong to
    groups of tokens that write the same text (`data.alignment`): a group's distribution is that of its first token
    times the probabilities of the further ones, and so need not sum to 1. A group counts once, with the weight of its
    first token, and the sum over the groups is divided by the weighted tokens. TRL's GOLDTrainer differs: its default
    takes the logits at a token, which predict the next one; it leaves the end of a turn out; and its mean is over the
    groups of a sequence, then over sequences.

    The ranks are the `top_k` largest ones and one bucket of the others, which gives a lower bound. It is too small by
    2 min(rest of p, rest of q) at most, the metric `uld_gap`; with `top_k` of the smaller vocabulary it is exact.
    """

    divergence_weight: PositiveFloat = 1.0
    ce_weight: NonNegativeFloat = 1.0  # without it only the continuations within groups tell which token it is
    top_k: PositiveInt = 128

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(), Entropy(), Correct(), TopLogps(self.top_k)

    @property
    def signals(self) -> tuple[str, ...]:
        return GROUP_PLACE, TEACHER_PROBS

    @property
    def separable(self) -> bool:
        return False

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Mean]]:
        weights, places, teacher = batch.loss_weights, batch.signals[GROUP_PLACE], batch.signals[TEACHER_PROBS]
        student = group_probs(scores, places)
        assert teacher.shape == student.shape, f"{TEACHER_PROBS} {teacher.shape} is not of top_k={self.top_k}"
        distance = jnp.abs(student - teacher).sum(2)
        losses = self.divergence_weight * distance - self.ce_weight * scores.logp
        of_groups = weights * (places == 1)
        metrics = {
            "loss": weighted_mean(losses, weights),
            "uld": weighted_mean(distance, of_groups),
            "uld_gap": weighted_mean(2 * jnp.minimum(student[..., -1], teacher[..., -1]), of_groups),
            "aligned": weighted_mean(places > 0, weights),
            "ce_loss": weighted_mean(-scores.logp, weights),
            "entropy": weighted_mean(scores.entropy, weights),
            "mean_token_accuracy": weighted_mean(scores.correct, weights),
        }
        return jnp.sum(losses * weights) / jnp.maximum(norm.tokens, 1), metrics
