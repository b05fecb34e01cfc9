"""A run on 1, 2 and 4 processes, and resumed on other numbers of them: the mode --compare of kill_campaign.py."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from campaign_runs import CASES, arguments
from forked_job import ForkedJob
from recipe_runs import killed_copy

DEVICES = 4  # of all processes together
RESUMED_AFTER = 3  # steps: with several updates on the same samples, in the middle of them
_MANY = ("checkpoint.every=3", "checkpoint.keep=10")
_ONE_ENGINE = "rl.placement.processes_per_engine=2"


class Run(NamedTuple):
    """A run of the comparison."""

    name: str
    processes: int
    resumed_from: str | None = None  # the name of another run
    overrides: tuple[str, ...] = ()
    replayed: bool = False  # the samples of the run on one process, instead of new ones


RUNS = [
    *(Run(f"on {count}", count) for count in (1, 2, 4)),
    *(
        Run(f"{before} to {after}", after, f"on {before}")
        for before, after in ((4, 2), (4, 1), (2, 4), (1, 4), (2, 1), (1, 2))
    ),
]
RL_RUNS = [
    Run("engine of 2 on 2", 2, overrides=(_ONE_ENGINE,)),
    Run("engines of 2 on 4", 4, overrides=(_ONE_ENGINE,)),
    Run("samples of 1 on 2", 2, replayed=True),
    Run("samples of 1 on 4", 4, replayed=True),
]


def compare(
    folder: Path, recipe: str, differences: Callable[[str, Path, Path], list[str]], say: Callable[[str], None]
) -> dict[str, list[str]]:
    """What differs in each run of a recipe from that on one process.

    `differences` compares two runs in the way that it is told (`campaign_runs.write_result`).
    """
    place, found = folder / "compared" / recipe, {}
    shutil.rmtree(place, ignore_errors=True)
    for run in [*RUNS, *(RL_RUNS if CASES[recipe].recipe == "rl" else [])]:
        to = place / run.name
        if run.resumed_from:
            killed_copy(place / run.resumed_from, to, RESUMED_AFTER)
        command = ["train", *arguments(folder, recipe, to, *_MANY, *run.overrides)]
        if run.replayed:
            command = ["replay", str(place / "on 1"), str(to)]
        job = ForkedJob(place / f"{run.name}.log", run.processes, command, devices=DEVICES)
        job.wait()
        if set(job.codes.values()) != {0}:
            found[run.name] = [f"exit codes {job.codes}"]
        elif run.name != "on 1":
            found[run.name] = differences("losses" if run.replayed else "samples", to, place / "on 1")
        say(f"{recipe} {run.name}: {max(job.seconds.values()):.1f} s, {found.get(run.name, [])}")
    return found


def compared_table(found: dict[str, dict[str, list[str]]]) -> str:
    """In Markdown, with a row for each run and a column for each recipe."""
    names = list(dict.fromkeys(name for runs in found.values() for name in runs))
    lines = [f"| | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for name in names:
        cells = ("" if name not in runs else "; ".join(runs[name]) or "equal" for runs in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
