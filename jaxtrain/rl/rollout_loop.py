"""`RolloutLoop`: the loop over rollouts, which can also be resumed between two updates on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.data.prompts import PromptStream
from jaxtrain.rl.coefficients import Coefficients
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.dealing import Deal
from jaxtrain.rl.experience import Experience, row_multiple
from jaxtrain.rl.pending import load_pending, remove_pending, save_pending
from jaxtrain.rl.rollouts import Prompt, Trajectory, support_metrics
from jaxtrain.rl.sample_sources import SampleSource
from jaxtrain.rl.scoring import conversation_metrics
from jaxtrain.rl.trajectories import sample_table, write_step
from jaxtrain.roles.role import TrainedRole
from jaxtrain.session.session import Session

_FOLDER = "experience"  # in the run's folder: samples with pending updates of each checkpoint


class RolloutLoop:
    """A `Resumable`: the state of the prompts and the coefficients and, between two updates on the same samples, these.

    The samples are written before the checkpoint that needs them, so they exist for every readable checkpoint.
    """

    def __init__(self, session: Session, prompts: PromptStream[Prompt], coefficients: Coefficients):
        assert session.config.rl is not None
        self._session, self._section, self._prompts = session, session.config.rl, prompts
        self._coefficients = coefficients
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
        """Yield the experience of each rollout until the run has ended or the prompts are exhausted.

        A resumed run starts with the experience whose updates are pending, if any. `make` converts samples to
        experience. `counters` return further metrics of a rollout.
        """
        session, self._source = self._session, source
        session.begin()
        while not session.ended:
            if self._experience is None or not self._experience.in_progress:
                session.window.wait()  # so that the time of pending updates does not count as rollout time
                with session.sampling():
                    samples = source(policy.params, session.step)
                if samples is None:
                    return
                self._experience = make(samples)
                trajectories = self._experience.trajectories
                session.record({**samples.metrics, **self._experience.metrics, **_metrics(trajectories, session.step)})
                state = source.state()
                if state is not None and math.isfinite(self.epoch_rows):  # a replay draws no prompts
                    session.record({"epoch": self._prompts.epoch(state)})
                for metrics in counters:
                    session.record(metrics())
                self._write(self._experience)
            yield self._experience

    @property
    def epoch_rows(self) -> float:
        """Prompts of an epoch of the mixture."""
        return self._prompts.epoch_rows

    def get_state(self) -> dict[str, Any]:
        """The state, JSON-serializable, from process 0. All write their samples if updates on them are pending."""
        assert self._source is not None and self._experience is not None
        in_progress, step, deal = self._experience.in_progress, self._session.step, self._experience.deal
        if in_progress:
            save_pending(self._folder, step, self._experience.pending_rows(), deal)
        if deal.process:
            return {}
        remove_pending(self._folder, {step, *self._session.saved_steps()})
        return {
            "prompts": self._source.state(),
            "coefficients": self._coefficients.get_state(),
            "updates_done": self._experience.done if in_progress else 0,
            "step": step,
            "processes": deal.processes,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if a file of samples with pending updates is missing."""
        self._prompts.set_state(state["prompts"])
        if "coefficients" in state:  # earlier versions had no targets, so theirs are the initial ones
            self._coefficients.set_state(state["coefficients"])
        if not state["updates_done"]:
            return
        if "processes" not in state:
            raise ValueError(
                f"{self._folder}: the samples of step {state['step']} have pending updates and were written by an "
                "earlier version: finish these updates with it, or remove the checkpoint of this step"
            )
        config, deal = self._session.config, Deal.of_run()
        multiple = row_multiple(config, self._session.mesh)
        rows = load_pending(self._folder, state["step"], state["processes"], deal, multiple)
        self._experience = Experience.resumed(rows, self._section.updates, state["updates_done"], deal)

    def _write(self, experience: Experience) -> None:
        """Record the samples under the step of the first update on them, and print some."""
        session, first, own = self._session, self._session.step + 1, experience.own
        write_step(session.folder.path, first, own, experience.deal)
        every = self._section.print_samples * self._section.updates
        if every and own and (first - 1) % every == 0:
            session.progress.show(sample_table(first, own))


def _metrics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Metrics of conversations and supports, and how many optimizer steps behind `step` the sampling weights were."""
    ages = [step - t.versions[t.loss_mask] for t in trajectories if t.loss_mask.any()]
    staleness = np.concatenate(ages) if ages else np.zeros(1)
    return {
        **conversation_metrics(trajectories),
        **support_metrics(trajectories),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": float(staleness.max()),
    }
