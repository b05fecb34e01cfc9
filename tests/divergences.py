"""The divergences of distillation as their paper defines them, in numpy."""

from __future__ import annotations

import numpy as np

from jaxtrain.objectives.objective import Divergence

KINDS = [Divergence("forward_kl"), Divergence("reverse_kl"), *(Divergence("jsd", beta) for beta in (0.1, 0.5, 0.9))]


def softmax(x: np.ndarray) -> np.ndarray:
    exps = np.exp(x - x.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def formula(of: Divergence, z: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Definitions (1) to (3) of GKD, arXiv:2306.13649: float64, per token. P is the teacher, Q the student."""

    def kl(a, b):
        return (a * np.log(a / b)).sum(-1)

    student, teacher = softmax(z), softmax(t)
    if of.kind != "jsd":
        return kl(teacher, student) if of.kind == "forward_kl" else kl(student, teacher)
    mixture = of.beta * teacher + (1 - of.beta) * student
    return of.beta * kl(teacher, mixture) + (1 - of.beta) * kl(student, mixture)


def sparse_formula(z: np.ndarray, t: np.ndarray, k: int) -> np.ndarray:
    """The forward KL over the teacher's top k and one bucket of the rest, in float64, per token."""
    student, teacher = softmax(z), softmax(t)
    top = np.argsort(-teacher, -1)[..., :k]
    p, q = (np.take_along_axis(x, top, -1) for x in (student, teacher))
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    return (q * np.log(q / p)).sum(-1)
