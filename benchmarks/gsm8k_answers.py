"""How often a model answers questions of GSM8K with the right final number."""

from __future__ import annotations

from collections.abc import Sequence

import jaxtrain as jt
from jaxtrain.rl.rewards import exact_answer


def greedy_accuracy(role: jt.Role, rows: Sequence[dict[str, str]], max_tokens: int, max_length: int) -> float:
    """The share of greedy answers of up to `max_tokens` tokens with the final number of the rows' answers."""
    params = jt.SamplingParams(max_tokens=max_tokens, temperature=0.0)
    answers = jt.generate(role, [row["question"] for row in rows], params, max_length=max_length)
    right = exact_answer([str(answer.text) for (answer,) in answers], [row["answer"] for row in rows])
    return sum(value or 0.0 for value in right) / len(rows)
