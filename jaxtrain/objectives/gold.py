"""Distillation from a teacher with another tokenizer: tokens that both vocabularies have are compared directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.objective import (
    TEACHER_FURTHER,
    TEACHER_HIDDEN,
    Correct,
    Entropy,
    HybridDistance,
    Logp,
    ScoreRequest,
    weighted_mean,
)
from jaxtrain.types import GROUP_PLACE, Array, Batch, Mean, Norm, Scores

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class GOLD(Checked):
    """divergence_weight * (w_m D + w_u U) + ce_weight * cross-entropy, over the weighted tokens.

    The hybrid loss of GOLD (Patiño et al. 2025, Hugging Face, "Unlocking On-Policy Distillation for Any Model Family";
    TRL's `uld_use_hybrid_loss`). p of the student and q of the teacher are the distributions of a group of tokens that
    write the same text, as in `ULD`. M are the tokens that both vocabularies write alike:

        D  the generalised JSD over M alone: with m = beta q + (1 - beta) p
           sum over M of beta q (log q - log m) + (1 - beta) p (log p - log m); beta 0 is the sum of q (log q - log p)
           and 1 that of p (log p - log q). p and q do not sum to 1 over M, so D may be negative at 0 and 1
        U  ULD over the other tokens: the sum over the ranks of |p_(i) - q_(i)|, exact

    w_m and w_u are `matched_weight` and `unmatched_weight`; None: the share of the teacher's vocabulary that is in M,
    and the rest. A group counts once, with the weight of its first token, and the sum is divided by the weighted
    tokens. TRL's mean is over the groups of a sequence, then over sequences; and its default
    `uld_token_merge_strategy` takes the logits at a token, which predict the next one.
    """

    beta: Share = 0.5
    matched_weight: NonNegativeFloat | None = None
    unmatched_weight: NonNegativeFloat | None = None
    divergence_weight: PositiveFloat = 1.0
    ce_weight: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.matched_weight is None) != (self.unmatched_weight is None):
            raise ValueError(
                f"matched_weight={self.matched_weight} and unmatched_weight={self.unmatched_weight}: give both, or "
                "neither for the share of the teacher's vocabulary"
            )

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        weights = None if self.matched_weight is None else (self.matched_weight, self.unmatched_weight or 0.0)
        return Logp(), Entropy(), Correct(), HybridDistance(self.beta, weights)

    @property
    def signals(self) -> tuple[str, ...]:
        return GROUP_PLACE, TEACHER_HIDDEN, TEACHER_FURTHER

    @property
    def separable(self) -> bool:
        return False

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Mean]]:
        weights, places = batch.loss_weights, batch.signals[GROUP_PLACE]
        losses = self.divergence_weight * scores.hybrid - self.ce_weight * scores.logp
        of_groups = weights * (places == 1)
        metrics = {
            "loss": weighted_mean(losses, weights),
            "hybrid": weighted_mean(scores.hybrid, of_groups),
            "matched": weighted_mean(scores.matched, of_groups),
            "unmatched": weighted_mean(scores.unmatched, of_groups),
            "aligned": weighted_mean(places > 0, weights),
            "ce_loss": weighted_mean(-scores.logp, weights),
            "entropy": weighted_mean(scores.entropy, weights),
            "mean_token_accuracy": weighted_mean(scores.correct, weights),
        }
        return jnp.sum(losses * weights) / jnp.maximum(norm.tokens, 1), metrics
