"""Distillation: a student is trained towards the distribution of a teacher at every weighted token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat

from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.objective import (
    TEACHER_HIDDEN,
    TEACHER_IDS,
    TEACHER_LOGPS,
    Correct,
    Divergence,
    DivergenceKind,
    Entropy,
    Logp,
    ScoreRequest,
    SparseDivergence,
    weighted_mean,
)
from jaxtrain.types import Array, Batch, Mean, Norm, Scores


@dataclass(frozen=True, kw_only=True)
class Distill(Checked):
    """divergence_weight * D(teacher, student) + ce_weight * cross-entropy, mean over the weighted tokens.

    D is exact, over the whole vocabulary:

        forward_kl  KL(teacher || student), Hinton et al. 2015 (arXiv:1503.02531)
        reverse_kl  KL(student || teacher), as MiniLLM has it (Gu et al. 2023, arXiv:2306.08543)
        jsd         the generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649), whose
                    mixture has the teacher with the share `beta`

    Both distributions of D are softmax(logits / temperature). As in GKD and TRL, D is not multiplied by temperature^2
    (which Hinton's gradient is): give divergence_weight = temperature^2 for that. The cross-entropy, of the tokens of
    the data, is at temperature 1.
    """

    kind: DivergenceKind = "forward_kl"
    beta: float = 0.5
    temperature: PositiveFloat = 1.0
    divergence_weight: PositiveFloat = 1.0
    ce_weight: NonNegativeFloat = 0.0
    sparse: bool = False  # D is that of `SparseDivergence`, from the teacher's top k

    SET_ELSEWHERE: ClassVar[Mapping[str, str]] = {"sparse": "teacher.cache sets it"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse and self.kind != "forward_kl":
            raise ValueError(f"kind={self.kind} needs the teacher's whole distribution: sparse=true is for forward_kl")
        _ = self.divergence  # checks its numbers

    @property
    def without_effect(self) -> dict[str, str]:
        """The numbers that change nothing -> why."""
        return {} if self.kind == "jsd" else {"beta": "only kind=jsd reads it"}

    @property
    def divergence(self) -> Divergence | SparseDivergence:
        """The requested score."""
        if self.sparse:
            return SparseDivergence(self.temperature)
        return Divergence(self.kind, self.beta, self.temperature)

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(), Entropy(), Correct(), self.divergence

    @property
    def signals(self) -> tuple[str, ...]:
        return (TEACHER_IDS, TEACHER_LOGPS) if self.sparse else (TEACHER_HIDDEN,)

    @property
    def separable(self) -> bool:
        return True

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Float[Array, ""], dict[str, Mean]]:
        weights = batch.loss_weights
        losses = self.divergence_weight * scores.divergence - self.ce_weight * scores.logp
        metrics = {
            "loss": weighted_mean(losses, weights),
            "divergence": weighted_mean(scores.divergence, weights),
            "ce_loss": weighted_mean(-scores.logp, weights),
            "entropy": weighted_mean(scores.entropy, weights),
            "mean_token_accuracy": weighted_mean(scores.correct, weights),
        }
        return jnp.sum(losses * weights) / jnp.maximum(norm.tokens, 1), metrics
