"""Means over prompts with their standard errors: rewards, pass@k and maj@k."""

from __future__ import annotations

from collections import Counter
from math import comb
from typing import Any

import numpy as np

from jaxtrain.observe.history import STD_ERROR
from jaxtrain.rl.numbers import final_number


def pass_rates(name: str, rewards: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Metrics of `rewards` [prompts, n] of the answers `texts` [prompts, n]; NaN: lost, or not applicable.

    `name` is the mean reward. If several answers have rewards of 0 and 1, there are also, for k of the powers of two up
    to n, and n itself:

        name/pass@k  the probability that one of k answers is right, 1 - C(n - c, k) / C(n, k) with c right ones: Chen
                     et al. 2021 (arXiv:2107.03374)
        name/maj@n   whether the most frequent answer is right (Wang et al. 2022, arXiv:2203.11171); answers are the
                     same if their final numbers are, or without a number their texts

    and of each of these `..._std_error`, the standard error of the mean over prompts. A prompt with a lost reward does
    not count.
    """
    known = ~np.isnan(rewards).any(1)
    rewards, texts = rewards[known], texts[known]
    if not len(rewards):
        return {}
    n = rewards.shape[1]
    found = {name: rewards.mean(1)}
    if n > 1 and np.isin(rewards, (0, 1)).all():
        right = rewards.sum(1).astype(int)
        for k in sorted({2**power for power in range(n.bit_length())} | {n}):
            found[f"{name}/pass@{k}"] = np.array([1 - comb(n - c, k) / comb(n, k) for c in right.tolist()])
        found[f"{name}/maj@{n}"] = np.array([_majority(*pair) for pair in zip(rewards, texts, strict=True)])
    errors = {
        key + STD_ERROR: values.std(ddof=1) / len(values) ** 0.5 for key, values in found.items() if len(values) > 1
    }
    return {key: float(values.mean()) for key, values in found.items()} | {k: float(v) for k, v in errors.items()}


def _majority(rewards: np.ndarray, texts: np.ndarray) -> float:
    """The reward of the most frequent answer, of the first of equally frequent ones."""
    answers: list[Any] = [text.strip() if (number := final_number(text)) is None else number for text in texts]
    majority = Counter(answers).most_common(1)[0][0]
    return float(rewards[answers.index(majority)])
