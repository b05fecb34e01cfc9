"""Held-out loss, and answers decoded from held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax

from jaxtrain.lora import join
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Objective
from jaxtrain.train.step import Metrics, add_metrics, batch_norm, score
from jaxtrain.types import Batch, Params


def make_eval_step(model: Model, objective: Objective) -> Callable[[Params, Params, Batch], Metrics]:
    """A pure `(params, frozen, batch) -> metrics`, without dropout; jit it."""

    def eval_step(params: Params, frozen: Params, batch: Batch) -> Metrics:
        _, metrics = objective(score(model, join(params, frozen), batch), batch, batch_norm(batch))
        return metrics

    return eval_step


def evaluate(
    eval_step: Callable[[Params, Params, Batch], Metrics], params: Params, frozen: Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over all batches, named `eval_*`, with `eval_perplexity` beside `eval_loss`."""
    total: Metrics = {}
    for batch in batches:
        metrics = eval_step(params, frozen, batch)
        total = add_metrics(total, metrics) if total else metrics
    means = {f"eval_{name}": float(mean.value) for name, mean in jax.device_get(total).items()}
    if "eval_loss" in means:
        means["eval_perplexity"] = math.exp(min(means["eval_loss"], 700))
    return means
