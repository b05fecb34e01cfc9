"""`RolloutLoop`: one rollout after the other, resumed also in the middle of the updates on its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.experience import Experience
from jaxtrain.rl.rollouts import Prompt, Trajectory, support_metrics
from jaxtrain.rl.scoring import conversation_metrics
from jaxtrain.rl.sources import SampleSource
from jaxtrain.rl.trajectories import sample_table, write_step
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.session import Session

_FOLDER = "experience"  # of the run: samples whose updates a checkpoint is in the middle of, one file a step


class RolloutLoop:
    """A `Resumable`: the state of the prompts and, between two updates on the same samples, these samples.

    The samples are written before the checkpoint that needs them, so a checkpoint that can be read always finds them.
    """

    def __init__(self, session: Session, prompts: PromptStream[Prompt]):
        assert session.config.rl is not None
        self._session, self._section, self._prompts = session, session.config.rl, prompts
        self._folder = session.folder.path / _FOLDER
        self._source: SampleSource | None = None
        self._experience: Experience | None = None

    def experiences(
        self,
        source: SampleSource,
        policy: TrainedRole,
        make: Callable[[Collected], Experience],
        counters: Sequence[Callable[[], dict[str, float]]],
    ) -> Iterator[Experience]:
        """The experience of each rollout until the run has ended or the prompts are exhausted.

        A resumed run begins with the one that its checkpoint is in the middle of. `make` turns samples into experience.
        `counters` give further metrics of a rollout.
        """
        session, self._source = self._session, source
        session.begin()
        while not session.ended:
            if self._experience is None or not self._experience.in_progress:
                session.window.wait()  # the time of updates that are still running is theirs, not the rollout's
                samples = source(policy.params, session.step)
                if samples is None:
                    return
                self._experience = make(samples)
                trajectories = self._experience.trajectories
                session.record({**samples.metrics, **self._experience.metrics, **_metrics(trajectories, session.step)})
                for metrics in counters:
                    session.record(metrics())
                self._write(self._experience)
            yield self._experience

    def get_state(self) -> dict[str, Any]:
        """JSON-able. Writes the samples if the run is in the middle of the updates on them."""
        assert self._source is not None and self._experience is not None
        in_progress, step = self._experience.in_progress, self._session.step
        if in_progress:
            self._experience.save(self._path(step))
        done = self._experience.done if in_progress else 0
        kept = {step, *self._session.saved_steps()}
        for path in self._folder.glob("*.npz"):
            if int(path.stem) not in kept:
                path.unlink()
        return {
            "prompts": self._source.state(),
            "updates_done": done,
            "step": step,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._prompts.set_state(state["prompts"])
        if state["updates_done"]:
            path = self._path(state["step"])
            self._experience = Experience.load(path, self._section.updates, state["updates_done"])

    def _path(self, step: int) -> Path:
        return self._folder / f"{step}.npz"

    def _write(self, experience: Experience) -> None:
        """Record the samples under the number of the first update on them, and print some."""
        session, first = self._session, self._session.step + 1
        write_step(session.folder.path, first, experience.trajectories)
        every = self._section.print_samples * self._section.updates
        if every and experience.trajectories and (first - 1) % every == 0:
            session.progress.show(sample_table(first, experience.trajectories))


def _metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Of the conversations, the supports, and how many optimizer steps behind `step` the sampling weights were."""
    ages = [step - t.versions[t.loss_mask] for t in trajectories if t.loss_mask.any()]
    staleness = np.concatenate(ages) if ages else np.zeros(1)
    return {
        **conversation_metrics(trajectories),
        **support_metrics(trajectories),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
