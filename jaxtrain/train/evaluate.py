"""Metrics of an objective on held-out batches."""

from collections.abc import Callable, Iterable, Mapping

import jax

from jaxtrain.lora import join
from jaxtrain.nn.model import Model
from jaxtrain.objectives.objective import Objective
from jaxtrain.ops.head_chunks import Head
from jaxtrain.ops.hybrid import MatchedHead
from jaxtrain.train.step import Metrics, add_metrics, add_signals, batch_norm, scores_of
from jaxtrain.types import Batch, Params


def make_eval_step(model: Model, objective: Objective) -> Callable[..., Metrics]:
    """A pure function `(params, frozen, batch, teacher_head=None) -> metrics`, without dropout; not jitted."""

    def eval_step(
        params: Params, frozen: Params, batch: Batch, teacher_head: Head | MatchedHead | None = None
    ) -> Metrics:
        params = join(params, frozen)
        hidden = model.hidden(params, batch)
        batch = add_signals(objective, lambda *needs: scores_of(model, params, hidden, batch, needs), batch)
        scores = scores_of(model, params, hidden, batch, objective.needs, teacher_head=teacher_head)
        _, metrics = objective(scores, batch, batch_norm(batch))
        return metrics

    return eval_step


def evaluate(
    eval_step: Callable[[Params, Params, Batch], Metrics],
    params: Params,
    frozen: Params,
    sources: Mapping[str, Iterable[Batch]],
) -> dict[str, float]:
    """Means over all batches of all sources, named `eval_*`.

    `sources` are batches by the name of what they are read from; each name that is not empty has its own
    `eval_NAME_loss`. The mean is over the tokens of all of them, so that a source counts by its size.
    """
    total: Metrics = {}
    means: dict[str, float] = {}
    for source, batches in sources.items():
        of_source: Metrics = {}
        for batch in batches:
            metrics = eval_step(params, frozen, batch)
            # The host runs at most one batch ahead of the device, so that an iterator of batches can stop this.
            jax.block_until_ready(of_source)
            of_source = add_metrics(of_source, metrics) if of_source else metrics
        if source and "loss" in of_source:
            means[f"eval_{source}_loss"] = float(jax.device_get(of_source["loss"]).value)
        total = add_metrics(total, of_source) if total and of_source else total or of_source
    return means | {f"eval_{name}": float(mean.value) for name, mean in jax.device_get(total).items()}
