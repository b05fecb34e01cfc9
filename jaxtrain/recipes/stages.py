"""Several runs in turn, each from the model of the one before: see `jaxtrain.config.stages`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxtrain.config.stages import Stage
from jaxtrain.observe.run_files import METRICS
from jaxtrain.recipes.run import run
from jaxtrain.session.export import export_run
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.record import best_step, read_metrics, write_atomically
from jaxtrain.train.agree import barrier, gather_values
from jaxtrain.train.preemption import Preemption

REPORT = "report.md"
_EXPORTED = "exported_step"  # a file in a stage's folder: the step of its checkpoint that `export` has


def run_stages(
    stages: Sequence[Stage],
    *,
    resume: bool = True,
    allow_change: Sequence[str] = (),
    preemption: Preemption | None = None,
) -> int:
    """Run the stages that are not complete, in their order. Returns the exit code: that of a stage that was stopped.

    Each is exported to `Stage.export`, its best checkpoint if it has `eval.best`. A complete stage is not run again.
    The report, `report.md` beside the stages' folders, has the last metrics of each. The other arguments and the errors
    are those of `Session.open`.
    """
    for stage in stages:
        print(f"stage {stage.name} ({stage.config.recipe}) in {stage.folder}", flush=True)
        outcome = run(stage.config, resume=resume, allow_change=allow_change, preemption=preemption)
        if outcome.exit_code:
            return outcome.exit_code
        _export(stage)
        if jax.process_index() == 0:
            write_report(stages)
    return 0


def _export(stage: Stage) -> None:
    """Export a complete stage, unless that is done. All processes call it, which read parameters together.

    A stage that has gone on since its export, such as to a larger `train.steps`, is exported again.
    """
    best = stage.config.eval.best is not None
    step = best_step(stage.folder) if best else checkpoint_steps(stage.folder)[-1]
    record = stage.folder / _EXPORTED
    done = _is_exported(stage) and record.is_file() and record.read_text() == str(step)
    if gather_values(done)[0]:
        return
    if jax.process_index() == 0:
        record.unlink(missing_ok=True)
        if _is_exported(stage):
            shutil.rmtree(stage.export)
    barrier(f"{stage.name} may be exported")
    export_run(stage.folder, stage.export, step=step)
    if jax.process_index() == 0:
        write_atomically(record, str(step))
    barrier(f"{stage.name} is exported")


def _is_exported(stage: Stage) -> bool:
    return (stage.export / "config.json").is_file()


def write_report(stages: Sequence[Stage]) -> Path:
    """Write the report of the stages that have begun, and return its path."""
    lines = ["# Stages", ""]
    for stage in stages:
        found = read_metrics(stage.folder) if (stage.folder / METRICS).is_file() else []
        if not found:
            lines += [f"## {stage.name} ({stage.config.recipe}): no step yet", ""]
            continue
        last: dict[str, float] = {}
        for line in found:
            last |= line
        state = "exported" if _is_exported(stage) else "not complete"
        lines += [f"## {stage.name} ({stage.config.recipe}): step {last['step']:.0f}, {state}", ""]
        lines += ["| metric | first | last |", "|---|---|---|"]
        names = [name for name in last if name == "loss" or name.startswith(("eval_", "reward"))]
        for name in names:
            values = [line[name] for line in found if name in line]
            lines.append(f"| {name} | {values[0]:.4g} | {values[-1]:.4g} |")
        lines.append("")
    path = stages[0].folder.parent / REPORT
    write_atomically(path, "\n".join(lines))
    return path
