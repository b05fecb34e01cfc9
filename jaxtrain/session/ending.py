"""What a run prints after its last step: what was trained, its metrics, where they are, and what to do next."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtrain.config import RunConfig
from jaxtrain.data.shards import COUNTERS
from jaxtrain.observe.history import STD_ERROR, better, read_series
from jaxtrain.observe.run_files import CHECKPOINTS, REPORT
from jaxtrain.observe.status import duration_text

log = logging.getLogger(__name__)

_MAX_METRICS = 8


def warn_of_early_end(step: int, steps: int, metrics: Mapping[str, float], reason: str) -> None:
    """Warn where a run ended before its last step, whose learning rate is then not the end of its schedule."""
    if step < steps:
        rate = metrics.get("learning_rate", math.nan)
        log.warning(
            "%s after step %d of %d: the learning rate was still %.3g, its schedule is not done",
            *(reason, step, steps, rate),
        )


def trained_text(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """What a run has trained on. `metrics`: the last value of each. Rows that were cut or refused are named."""
    parts = [f"trained {step} of {steps} steps"]
    if "epoch" in metrics:
        parts.append(f"{metrics['epoch']:.2f} epochs")
    named = {"data/examples": "examples", "num_tokens": "tokens"}
    named |= {f"data/{name}": name.replace("_", " ") for name in COUNTERS if metrics.get(f"data/{name}")}
    return ", ".join([*parts, *(f"{metrics[key]:,.0f} {name}" for key, name in named.items() if key in metrics)])


def end_facts(
    config: RunConfig, folder: Path, seconds: Mapping[str, float], kept: Sequence[int], best: int | None
) -> list[tuple[str, str]]:
    """Names and texts. `seconds`: of the whole run by activity. `kept`: the steps of the checkpoints, of which `best`
    is that of eval.best.
    """
    series = read_series(folder)
    total = sum(seconds.values()) or 1.0
    others = sorted(((value, name) for name, value in seconds.items() if name != "steps" and value >= 1), reverse=True)
    rates = series["tokens_per_second"].values if "tokens_per_second" in series else []
    speed = f"; {sorted(rates)[len(rates) // 2]:,.0f} tokens/s (median)" if rates else ""
    spent = ", ".join(f"{name} {duration_text(value)}" for value, name in others)
    facts = [
        (
            "time",
            f"{duration_text(total)}: steps {duration_text(seconds['steps'])}"
            + (f", {spent}" if spent else "")
            + speed,
        )
    ]
    # The loss of a policy gradient does not measure how good the policy is.
    first = "reward" if config.recipe == "rl" else "loss"
    shown = [name for name in series if name == first or (name.startswith("eval_") and not name.endswith(STD_ERROR))]
    chosen = config.eval.best
    for name in shown[:_MAX_METRICS]:
        mode = chosen.mode if chosen is not None and chosen.metric == name else better(name)
        values = series[name].values
        error = series.get(name + STD_ERROR)
        text = f"{values[-1]:.4f}" + (f" ± {error.values[-1]:.4f}" if error else "")
        if mode and len(values) > 1:
            step, value = series[name].best(mode)
            text += f" (first {values[0]:.4f}, best {value:.4f} at step {step})"
        facts.append((name, text))
    if kept:
        steps = ", ".join(f"{step} (best)" if step == best else str(step) for step in kept)
        facts.append(("checkpoints", f"{folder / CHECKPOINTS}: {steps}"))
        facts.append(("report", str(folder / REPORT)))
        export = f"jaxtrain export {config.run.dir} OUT" + (" --best" if best is not None else "")
        speaks = config.recipe != "reward"
        facts.append(("next", f"jaxtrain chat {config.run.dir} (or generate, serve); {export}" if speaks else export))
    return facts
