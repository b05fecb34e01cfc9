"""Preference objectives: losses of pairs of answers to one prompt, of which one was preferred.

A pair is a bundle of two segments. Signals, all [B, T]:

    sign       1 on the chosen answer's tokens, -1 on the rejected one's
    margin     where the data has it: by how much the chosen answer is better
    ref_logps  of the reference policy, where the objective has one; only their sums over an answer are read

`log pi` of an answer is the sum of its weighted tokens' log-probabilities. Every loss is a mean over the pairs of the
global batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from jaxtrain.objectives.objective import Correct, Entropy, Logp, Score, ScoreRequest, mean_where, weighted_mean
from jaxtrain.objectives.segments import bundle_sums, bundles_with
from jaxtrain.types import MARGIN, REF_LOGPS, SIGN, Array, Batch, Mean, Metric, Norm, Scores

_NLL_WEIGHTS = "nll_weights"  # of the chosen answers' tokens; they sum to 1 over the global batch


class PairSide(NamedTuple):
    """One side of all pairs, [B, T + 1] each: index i is pair i of the row."""

    logp: Array  # sum over the answer's tokens; differentiable
    ref_logp: Array  # the reference's; 0 without one
    tokens: Array  # sum of the weights
    margin: Array  # of the pair; 0 without one

    @property
    def log_ratio(self) -> Array:
        """log pi / pi_ref."""
        return self.logp - self.ref_logp

    def mean(self, values: Array) -> Array:
        """`values` per token of the answer."""
        return values / jnp.maximum(self.tokens, 1)


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(ABC):
    """What all preference objectives share. A custom one is a frozen dataclass with `pair_losses` and `rewards`."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be more than 0")

    @property
    def needs(self) -> tuple[ScoreRequest, ...]:
        return Logp(), Entropy(), Correct()

    @property
    def has_reference(self) -> bool:
        """Whether the loss reads `ref_logps`."""
        return False

    @property
    def reads_margin(self) -> bool:
        """Whether the loss reads `margin`."""
        return False

    @property
    def nll_weight(self) -> float:
        """Weight of the chosen answers' negative log-likelihood, a mean over their tokens in the global batch."""
        return 0.0

    @property
    def signals(self) -> tuple[str, ...]:
        return SIGN, *([REF_LOGPS] if self.has_reference else []), *([_NLL_WEIGHTS] if self.nll_weight else [])

    @property
    def separable(self) -> bool:
        return False

    @abstractmethod
    def pair_losses(self, chosen: PairSide, rejected: PairSide) -> Array:
        """The loss of each pair [B, T + 1], without the negative log-likelihood."""

    @abstractmethod
    def rewards(self, answers: PairSide) -> Array:
        """The implicit reward of each answer [B, T + 1], for the metrics."""

    def prepare(self, score: Score, batch: Batch) -> Mapping[str, Array]:
        """Weights of the negative log-likelihood, whose divisor is the number of chosen tokens of the global batch."""
        if not self.nll_weight:
            return {}
        weights = jnp.where(batch.signals[SIGN] > 0, batch.loss_weights, 0)
        return {_NLL_WEIGHTS: weights / jnp.maximum(jnp.sum(weights), 1)}

    def __call__(self, scores: Scores, batch: Batch, norm: Norm) -> tuple[Array, dict[str, Metric]]:
        assert batch.bundle_ids is not None, "preference pairs must be packed as bundles"
        if MARGIN in batch.signals and not self.reads_margin:
            raise ValueError(
                f"the data has a column `margin`, which {type(self).__name__} does not use as it is configured: leave "
                "the column out, or use DPO with loss=sigmoid"
            )
        weights, ids = batch.loss_weights, batch.bundle_ids
        chosen, rejected = (self._answers(scores.logp, batch, ids, sign) for sign in (1, -1))
        pairs = bundles_with(weights, ids)
        losses = jnp.sum(jnp.where(pairs, self.pair_losses(chosen, rejected), 0))
        value = losses / jnp.maximum(norm.bundles, 1)
        if self.nll_weight:
            value = value - self.nll_weight * jnp.sum(scores.logp * batch.signals[_NLL_WEIGHTS])
        count = jnp.sum(pairs)
        of_chosen, of_rejected = self.rewards(chosen), self.rewards(rejected)
        metrics: dict[str, Metric] = {
            "loss": Mean(value * norm.bundles, count),  # a mean over pairs also of several batches
            "rewards/chosen": mean_where(pairs, of_chosen),
            "rewards/rejected": mean_where(pairs, of_rejected),
            "rewards/accuracies": mean_where(pairs, of_chosen > of_rejected),
            "rewards/margins": mean_where(pairs, of_chosen - of_rejected),
            "logps/chosen": mean_where(pairs, chosen.logp),
            "logps/rejected": mean_where(pairs, rejected.logp),
            "entropy": weighted_mean(scores.entropy, weights),
            "mean_token_accuracy": weighted_mean(scores.correct, weights),
        }
        return value, metrics

    def _answers(self, logp: Array, batch: Batch, ids: Array, sign: int) -> PairSide:
        weights = jnp.where(batch.signals[SIGN] == sign, batch.loss_weights, 0)
        ref = batch.signals[REF_LOGPS] * weights if self.has_reference else jnp.zeros_like(weights)
        margin = batch.signals.get(MARGIN, jnp.zeros_like(weights)) * weights
        tokens = bundle_sums(weights, ids)
        return PairSide(
            logp=bundle_sums(logp * weights, ids),
            ref_logp=bundle_sums(ref, ids),
            tokens=tokens,
            margin=bundle_sums(margin, ids) / jnp.maximum(tokens, 1e-9),
        )


PairLoss = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero", "apo_down", "sft"]


@dataclass(frozen=True, kw_only=True)
class DPO(PreferenceObjective):
    """Direct preference optimization: Rafailov et al. 2023 (arXiv:2305.18290), and the losses that followed it.

    `loss` is the name of one, or a mapping of names to weights, whose losses are added up (MPO, Wang et al. 2024,
    arXiv:2411.10442). With r = beta log(pi / pi_ref) of the chosen (c) and of the rejected (l) answer, and eps the
    `label_smoothing`:

        sigmoid       -(1 - eps) log s(r_c - r_l) - eps log s(r_l - r_c): DPO; with eps conservative DPO (Mitchell 2023)
        hinge         max(0, 1 - (r_c - r_l)): SLiC, Zhao et al. 2023 (arXiv:2305.10425)
        ipo           (d - 1 / (2 beta))^2, d the difference of log(pi / pi_ref) per token: Azar et al. 2023
                      (arXiv:2310.12036), by token as its authors ran it
        robust        (sigmoid's (1 - eps) part - eps of its mirror) / (1 - 2 eps): Chowdhury et al. 2024
                      (arXiv:2403.00409)
        sigmoid_norm  sigmoid with r per token: Meng et al. 2024 (arXiv:2405.14734) with a reference
        apo_zero      1 - s(r_c) + s(r_l): D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7
        apo_down      s(r_c) + 1 - s(r_c - r_l): equation 8
        sft           the chosen answers' negative log-likelihood, a mean over their tokens

    A pair's `margin` is subtracted from r_c - r_l in sigmoid: ODPO, Amini et al. 2024 (arXiv:2402.10571).
    """

    loss: PairLoss | Mapping[PairLoss, float] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and less than 0.5")
        if self.label_smoothing and self._weights.keys().isdisjoint(("sigmoid", "robust")):
            raise ValueError(f"label_smoothing={self.label_smoothing} has no effect with loss={self.loss}")

    @property
    def _weights(self) -> Mapping[PairLoss, float]:
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

    @property
    def has_reference(self) -> bool:
        return True

    @property
    def reads_margin(self) -> bool:
        return self._weights.keys() <= {"sigmoid", "sft"}

    @property
    def nll_weight(self) -> float:
        return self._weights.get("sft", 0.0)

    def rewards(self, answers: PairSide) -> Array:
        return self.beta * answers.log_ratio

    def pair_losses(self, chosen: PairSide, rejected: PairSide) -> Array:
        return sum(
            (weight * self._loss(kind, chosen, rejected) for kind, weight in self._weights.items() if kind != "sft"),
            jnp.zeros_like(chosen.logp),
        )

    def _loss(self, kind: PairLoss, chosen: PairSide, rejected: PairSide) -> Array:
        eps, of_chosen, of_rejected = self.label_smoothing, self.rewards(chosen), self.rewards(rejected)
        margin = of_chosen - of_rejected
        by_token = chosen.mean(chosen.log_ratio) - rejected.mean(rejected.log_ratio)
        match kind:
            case "sigmoid":
                return _smoothed(margin - chosen.margin, eps)
            case "hinge":
                return jax.nn.relu(1 - margin)
            case "ipo":
                return (by_token - 1 / (2 * self.beta)) ** 2
            case "robust":
                return (-(1 - eps) * log_sigmoid(margin) + eps * log_sigmoid(-margin)) / (1 - 2 * eps)
            case "sigmoid_norm":
                return -log_sigmoid(self.beta * by_token)
            case "apo_zero":
                return 1 - sigmoid(of_chosen) + sigmoid(of_rejected)
            case "apo_down":
                return sigmoid(of_chosen) + 1 - sigmoid(margin)
            case _:
                raise AssertionError(kind)


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceObjective):
    """-log s(beta (m_c - m_l) - gamma), m the mean log-probability of an answer's tokens: Meng et al. 2024
    (arXiv:2405.14734). Needs no reference."""

    beta: float = 2.0
    gamma: float = 1.0  # the target margin

    def rewards(self, answers: PairSide) -> Array:
        return self.beta * answers.mean(answers.logp)

    def pair_losses(self, chosen: PairSide, rejected: PairSide) -> Array:
        return -log_sigmoid(self.rewards(chosen) - self.rewards(rejected) - self.gamma)


@dataclass(frozen=True, kw_only=True)
class CPO(PreferenceObjective):
    """-log s(beta (log pi_c - log pi_l)) + alpha NLL of the chosen answers: Xu et al. 2024 (arXiv:2401.08417).

    Needs no reference. The negative log-likelihood is a mean over the tokens of all chosen answers.
    """

    alpha: float = 1.0
    label_smoothing: float = 0.0

    @property
    def nll_weight(self) -> float:
        return self.alpha

    def rewards(self, answers: PairSide) -> Array:
        return self.beta * answers.logp

    def pair_losses(self, chosen: PairSide, rejected: PairSide) -> Array:
        return _smoothed(self.rewards(chosen) - self.rewards(rejected), self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class ORPO(PreferenceObjective):
    """NLL of the chosen answers - beta log s(log odds_c - log odds_l), odds = p / (1 - p) with p the geometric mean of
    an answer's token probabilities: Hong et al. 2024 (arXiv:2403.07691; beta is its lambda). Needs no reference."""

    @property
    def nll_weight(self) -> float:
        return 1.0

    def rewards(self, answers: PairSide) -> Array:
        return self.beta * answers.mean(answers.logp)

    def pair_losses(self, chosen: PairSide, rejected: PairSide) -> Array:
        return -self.beta * log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def _smoothed(margin: Array, eps: float) -> Array:
    """-log s(margin), where a share `eps` of the pairs is taken to be labelled the wrong way round."""
    return -(1 - eps) * log_sigmoid(margin) - eps * log_sigmoid(-margin)


def _log_odds(answers: PairSide) -> Array:
    """log(p / (1 - p)), finite where p rounds to 1."""
    logp = jnp.minimum(answers.mean(answers.logp), -1e-6)
    return logp - jnp.log(-jnp.expm1(logp))
