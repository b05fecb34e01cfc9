"""Kills runs of every recipe at random times, resumes them, and compares them with runs that were not killed.

    python tests/kill_campaign.py --recipes sft,grpo --processes 1,2,4,mixed --kills 20 --seed 1 --folder /tmp/campaign

A run is killed a few times: one of its processes, or all, in a random phase of its work (`forked_job.PHASES`) or at a
random time since its start. It is started again until it is complete. With the number of processes `mixed` every start
has another one. With `--launched`, `jaxtrain launch --backend local` starts it again by itself. Prints what every kill
has hit, and a Markdown table, which is also written to table.md in the folder. The exit code is 1 if a resumed run
differs, or a process did not end as it should.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from campaign_runs import CASES, arguments, prepare_cases, write_result
from forked_job import START_UP, ForkedJob, Kill, fork, import_recipes, phase_durations
from launched_job import kill_launched
from process_comparison import compare, compared_table

MARK = "JAXTRAIN_KILL_CAMPAIGN"  # a variable of the environment of all processes
KILLS_OF_A_RUN = 4
RESTARTS = 3  # by `jaxtrain launch`, its default
MIXED = "mixed"
COUNTS = (1, 2, 4)  # of processes, with `mixed`


class Row(NamedTuple):
    """A line of the table."""

    recipe: str
    processes: str
    runs: int
    kills: Counter[str]  # by phase
    equal: int
    failures: list[str]


class Campaign:
    """Runs, killed runs and comparisons, all in processes of their own."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self._durations: dict[tuple[str, str], list[dict[str, list[float]]]] = {}  # by rank, of complete runs
        self._seconds: dict[tuple[str, str], float] = {}

    def row(self, recipe: str, processes: str, kills: int) -> Row:
        """Kill runs of a recipe until there are so many kills."""
        row = Row(recipe, processes, 0, Counter(), 0, [])
        self._measure(recipe, processes)
        while sum(row.kills.values()) < kills:
            row = self._killed_run(row, min(KILLS_OF_A_RUN, kills - sum(row.kills.values())))
        return row

    def launched(self, recipe: str, nodes: int) -> Row:
        """`jaxtrain launch --backend local` of a recipe, of which it restarts one of its processes after every kill."""
        name, place = f"{recipe}-{nodes}", self._folder / "launched"
        shutil.rmtree(place, ignore_errors=True)
        given = [arguments(self._folder, recipe, place / each, "checkpoint.every=1") for each in ("whole", name)]
        whole = ForkedJob(place / "whole.log", nodes, ["train", *given[0]], devices=nodes)
        whole.wait()
        launch = ["launch", *given[1], "--backend", "local", "--nodes", str(nodes)]
        job = ForkedJob(place / f"{name}.log", 1, launch, devices=1)
        kills = kill_launched(job, place / name, nodes=nodes, kills=RESTARTS, chosen=self._random)
        failures = [f"exit codes {each.codes}" for each in (whole, job) if set(each.codes.values()) != {0}]
        failures = failures or self.compare("equal", place / name, place / "whole")
        if (restarts := job.printed(0).count("starting again from the last checkpoint")) != kills:
            failures.append(f"{restarts} restarts after {kills} kills")
        if kills < RESTARTS:
            failures.append(f"only {kills} of {RESTARTS} kills")
        failures += self._left_behind()
        say(f"{recipe} launched on {nodes}: {kills} kills, {job.seconds[0]:.1f} s, {failures}")
        return Row(recipe, f"{nodes}, launched", 1, Counter({"launched": kills}), not failures, failures)

    def reference(self, recipe: str, processes: str) -> Path:
        return self._folder / "whole" / f"{recipe}-{COUNTS[0] if processes == MIXED else processes}"

    def _measure(self, recipe: str, processes: str) -> None:
        """The complete run, and how long its phases take."""
        for count in COUNTS if processes == MIXED else (int(processes),):
            if (recipe, str(count)) in self._durations:
                continue
            run = self.reference(recipe, str(count))
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(f"{run}.cache", ignore_errors=True)
            job = self._start(recipe, count, run, None)
            job.wait()
            assert set(job.codes.values()) == {0}, f"{recipe} on {count} processes: {job.printed(0)}"
            self._durations[recipe, str(count)] = [phase_durations(job.events(rank)) for rank in range(count)]
            self._seconds[recipe, str(count)] = max(job.seconds.values())
            say(f"{recipe} on {count}: {self._seconds[recipe, str(count)]:.1f} s")

    def _killed_run(self, row: Row, kills: int) -> Row:
        recipe, processes = row.recipe, row.processes
        run = self._folder / "killed" / f"{recipe}-{processes}-{row.runs}"
        failures, hit, starts = [], Counter(), 0
        while True:
            count = self._random.choice(COUNTS) if processes == MIXED else int(processes)
            rank, kill_all = self._random.randrange(count), self._random.random() < 0.3
            kill = self._kill(recipe, count, rank) if sum(hit.values()) < kills else None
            job = self._start(recipe, count, run, kill, rank, starts)
            job.wait(kill_all=kill_all and kill is not None)
            starts += 1
            if set(job.codes.values()) == {0}:
                break
            if kill is None or job.codes[rank] != -9:
                failures.append(f"exit codes {job.codes}: {job.printed(min(job.codes))[-2000:]}")
                break
            phase = job.phase(rank)
            phase = "save" if job.wrote(run, "**/checkpoints/*tmp*") else phase
            hit[phase] += 1
            fault = "" if kill_all else self._fault(job.codes, rank, phase)
            note = {"recipe": recipe, "count": count, "rank": rank, "kill": kill, "all": kill_all, "phase": phase}
            say(json.dumps(note | {"codes": job.codes, "run": run.name, "start": starts, "fault": fault}))
            failures += [fault] if fault else []
        if not failures:
            work = "prompts" if CASES[recipe].alone else "samples" if processes == MIXED else "equal"
            failures += self.compare(work, run, self.reference(recipe, processes))
        failures += self._left_behind()
        for failure in failures:
            say(f"FAILURE {run}: {failure}")
        if not failures:
            for path in (run, Path(f"{run}.cache"), *run.parent.glob(f"{run.name}.log*")):
                shutil.rmtree(path, ignore_errors=True)
        equal = row.equal + (not failures)
        return Row(recipe, processes, row.runs + 1, row.kills + hit, equal, [*row.failures, *failures])

    def _fault(self, codes: dict[int, int], rank: int, phase: str) -> str:
        """How the processes that were not killed ended otherwise than with the exit code of the one that was."""
        others = {code for each, code in codes.items() if each != rank}
        allowed = {137, -9} if phase == START_UP else {137}  # whoever starts the processes ends those that still join
        return "" if others <= allowed else f"one was killed during {phase}, the others ended with {others}"

    def _kill(self, recipe: str, count: int, rank: int) -> Kill:
        """In two of three cases in a random phase, else at a random time."""
        choose, durations = self._random, self._durations[recipe, str(count)][rank]
        if choose.random() < 1 / 3:
            return Kill(START_UP, 1, choose.random() * 0.6 * self._seconds[recipe, str(count)])
        phase = choose.choice(sorted(durations))
        entry = choose.randrange(max(1, len(durations[phase]) // 2)) + 1
        at_once = choose.random() < 0.2
        return Kill(phase, entry, 0.0 if at_once else choose.random() * 1.5 * median(durations[phase]))

    def _start(
        self, recipe: str, count: int, run: Path, kill: Kill | None, rank: int = 0, number: int = 0
    ) -> ForkedJob:
        return ForkedJob(
            run.parent / f"{run.name}.log{number}",
            count,
            ["train", *arguments(self._folder, recipe, run)],
            devices=count * CASES[recipe].devices,
            rank=rank,
            kill=kill,
        )

    def compare(self, work: str, run: Path, other: Path) -> list[str]:
        file = self._folder / "compared.json"
        file.unlink(missing_ok=True)
        in_a_process(lambda: write_result(work, run, other, file), self._folder / "compared.log")
        return json.loads(file.read_text())

    def _left_behind(self) -> list[str]:
        """Processes that killed ones have started, and that still run after a while."""
        mark = f"{MARK}={os.environ[MARK]}".encode()
        deadline = time.monotonic() + 10
        while True:
            found = [each for each in Path("/proc").iterdir() if each.name.isdigit() and _has(each, mark)]
            if not found or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return [f"left behind: {each.name}, {(each / 'cmdline').read_text()[:200]!r}" for each in found]


def _has(process: Path, mark: bytes) -> bool:
    try:
        return int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def in_a_process(work: Callable[[], int], log: Path) -> None:
    """Call `work`, which may start threads and JAX."""
    _, status = os.waitpid(fork(work, log), 0)
    assert status == 0, log.read_text()


def say(text: str) -> None:
    print(text, flush=True)


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| recipe | processes | runs | kills | of which during | runs as if not killed | failures |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        phases = ", ".join(f"{phase} {count}" for phase, count in row.kills.most_common())
        cells = (row.recipe, row.processes, row.runs, row.kills.total(), phases, row.equal, len(row.failures))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(CASES), help="names of campaign_runs.CASES")
    parser.add_argument("--processes", default="1,2,4,mixed")
    parser.add_argument("--kills", type=int, default=10, help="of each recipe on each number of processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--compare", action="store_true", help="kill nothing, and compare numbers of processes")
    parser.add_argument("--launched", action="store_true", help="kill processes that `jaxtrain launch` restarts")
    given = parser.parse_args()
    names = given.recipes.split(",")
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ[MARK] = str(os.getpid())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.folder / "compiled"))
    import_recipes()
    in_a_process(lambda: prepare_cases(given.folder, names) or 0, given.folder / "prepared.log")
    campaign, rows = Campaign(given.folder, given.seed), []
    if given.compare:
        found = {}
        for name in [name for name in names if not CASES[name].alone]:
            found[name] = compare(given.folder, name, campaign.compare, say)
            (given.folder / "compared.md").write_text(compared_table(found))
        say(compared_table(found))
        return int(any(any(runs.values()) for runs in found.values()))
    for name in names:
        for processes in ["1"] if CASES[name].alone else given.processes.split(","):
            if given.launched:
                rows.append(campaign.launched(name, int(processes)))
            else:
                rows.append(campaign.row(name, processes, given.kills))
            (given.folder / "table.md").write_text(table(rows))
    say(table(rows))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())
