"""Repeats the training of a reinforcement learning run from its recorded samples."""

import warnings
from pathlib import Path
from typing import NamedTuple

from jaxtrain.config import RunConfig, config_tree, parse_config
from jaxtrain.config.rl_parts import PlacementSection
from jaxtrain.parallel.distributed import initialize_distributed
from jaxtrain.recipes import rl
from jaxtrain.session.mirror import local_run
from jaxtrain.session.record import effective_config, read_metrics, read_saved_run, recorded_changes
from jaxtrain.train.agree import from_process_0


class ReplayResult(NamedTuple):
    steps: int  # number of steps that both runs logged
    difference: float  # maximum difference of their losses


def replay(run: str | Path, out: str | Path, overrides: list[str] | None = None) -> ReplayResult:
    """Train like the run in `run`, from its recorded samples, into `out`. Nothing is sampled.

    The config is that of the run's newest checkpoint. With the same devices and no `overrides` the losses are the same,
    unless the config was changed during the run (`--allow-change`), which causes a warning.

    Raises ValueError for a folder without a reinforcement learning run or without samples.
    """
    run, out = local_run(run), Path(out)
    if out.resolve() == run.resolve():
        raise ValueError(f"{out}: a replay must not write to the folder of the run that it replays")

    def of_replay(saved: RunConfig) -> RunConfig:
        return parse_config(config_tree(saved), f"the config of {run}", [f"run.dir={out}", *(overrides or [])])

    # The processes must join before anything of JAX is used, as it is to read a checkpoint.
    initialize_distributed(of_replay(effective_config(run)).distributed)
    config = of_replay(read_saved_run(run).config)
    if config.rl is None:
        raise ValueError(f"{run} is a run of recipe {config.recipe}, which records no samples")
    for change in recorded_changes(run):
        warnings.warn(
            f"{run}: {', '.join(change['changes'])} changed after step {change['step']}; all steps are replayed with "
            "the config of the newest checkpoint",
            RuntimeWarning,
            stacklevel=2,
        )
    section = config.rl.model_copy(update={"placement": PlacementSection()})
    rl.run(config.model_copy(update={"rl": section}), resume=False, replay=run)
    return ReplayResult(*from_process_0(lambda: _compared(_losses(run), _losses(out))))  # which wrote them


def _compared(before: dict[int, float], after: dict[int, float]) -> ReplayResult:
    shared = before.keys() & after.keys()
    return ReplayResult(len(shared), max((abs(before[step] - after[step]) for step in shared), default=0.0))


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line.get("loss") is not None}
