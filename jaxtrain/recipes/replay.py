"""Training once more from the samples that a run of reinforcement learning recorded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from jaxtrain.config import RunConfig, config_tree, parse_config
from jaxtrain.config.rollouts import PlacementSection
from jaxtrain.recipes import rl
from jaxtrain.session.record import read_metrics, read_saved_run, recorded_changes


class Compared(NamedTuple):
    steps: int  # that both runs logged
    difference: float  # the largest between their losses


def replay(run: str | Path, out: str | Path, overrides: list[str] | None = None) -> Compared:
    """Train as the run in `run` did, from its recorded samples, into `out`. Nothing is sampled.

    The config is that in the run's newest checkpoint. With the same devices and no `overrides` the losses are the same,
    unless the config was changed in the middle of the run (`--allow-change`), which a warning says.

    Raises ValueError for a folder without a run of reinforcement learning or its samples.
    """
    run, out = Path(run), Path(out)
    if out.resolve() == run.resolve():
        raise ValueError(f"{out}: a replay needs a folder of its own")
    tree = config_tree(read_saved_run(run).config)
    config = parse_config(tree, f"the config of {run}", [f"run.dir={out}", *(overrides or [])])
    if config.rl is None:
        raise ValueError(f"{run} is a run of the recipe {config.recipe}, which records no samples")
    for change in recorded_changes(run):
        warnings.warn(
            f"{run}: {', '.join(change['changes'])} changed after step {change['step']}; all steps are replayed with "
            "the config of the newest checkpoint",
            RuntimeWarning,
            stacklevel=2,
        )
    config = _update(config)
    rl.run(config, resume=False, replay=run)
    before, after = _losses(run), _losses(out)
    shared = before.keys() & after.keys()
    return Compared(len(shared), max((abs(before[step] - after[step]) for step in shared), default=0.0))


def _update(config: RunConfig) -> RunConfig:
    assert config.rl is not None
    section = config.rl.model_copy(update={"placement": PlacementSection()})
    return config.model_copy(update={"rl": section})


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line.get("loss") is not None}
