"""`RolloutLoop`: a run that stops between two updates on the same samples goes on with the others."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from trajectories import trajectory

from jaxtrain.config import MeshSection
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.rl.coefficients import Coefficients
from jaxtrain.rl.collect import Collected
from jaxtrain.rl.experience import Experience
from jaxtrain.rl.rollout_loop import RolloutLoop
from jaxtrain.rl.rollouts import pack_parts
from jaxtrain.rl.trajectories import recorded_steps

UPDATES = 3


class Source:
    """Samples that say which rollout they are of."""

    def __init__(self, rollouts):
        self.drawn, self.rollouts = 0, rollouts

    def __call__(self, params, number):
        if self.drawn == self.rollouts:
            return None
        self.drawn += 1
        return Collected([trajectory(number=self.drawn, sample=n) for n in range(UPDATES)], {"drawn": self.drawn}, 1)

    def state(self):
        return {"drawn": self.drawn}


def experience_from(samples):
    return Experience(pack_parts([[t] for t in samples.trajectories], 16, 1), UPDATES, samples.trajectories)


class Prompts:
    epoch_rows = 4

    def set_state(self, state):
        self.state = state

    def epoch(self, state):
        return state["drawn"] / self.epoch_rows


def session_in(folder, saved=()):
    recorded = []
    return SimpleNamespace(
        config=SimpleNamespace(
            rl=SimpleNamespace(print_samples=0, updates=UPDATES), train=SimpleNamespace(microbatches=1)
        ),
        mesh=make_mesh(MeshSection()),
        folder=SimpleNamespace(path=folder),
        window=SimpleNamespace(wait=lambda: None),
        begin=lambda: None,
        sampling=nullcontext,
        saved_steps=lambda: list(saved),
        record=recorded.append,
        recorded=recorded,
        ended=False,
        step=0,
    )


@contextmanager
def looping(folder, source, state=None, saved=()):
    session = session_in(folder, saved)
    loop = RolloutLoop(session, Prompts(), Coefficients(0.1, 0.0))
    if state is not None:
        loop.set_state(state)
        session.step = state["step"]

    def batches():
        for experience in loop.experiences(source, SimpleNamespace(params={}), experience_from, ()):
            for batch in experience:
                session.step += 1
                yield batch

    yield loop, batches(), session


def take(batches, count):
    return [next(batches).tokens for _ in range(count)]


def test_coefficients_that_have_moved_are_part_of_the_state(tmp_path):
    with looping(tmp_path / "run", Source(3)) as (loop, batches, _):
        loop._coefficients.beta = 0.25
        take(batches, 1)
        state = loop.get_state()
    with looping(tmp_path / "run", Source(3), state) as (loop, _, _):
        assert loop._coefficients == Coefficients(0.25, 0.0)
    del state["coefficients"]  # of a version without them
    with looping(tmp_path / "run", Source(3), state) as (loop, _, _):
        assert loop._coefficients == Coefficients(0.1, 0.0)


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_resumed_loop_gives_what_an_uninterrupted_one_would(tmp_path, steps):
    with looping(tmp_path / "whole", Source(3)) as (_, batches, _):
        expected = [batch.tokens for batch in batches]
    assert len(expected) == 3 * UPDATES
    with looping(tmp_path / "run", Source(3)) as (loop, batches, _):
        before = take(batches, steps)
        state = loop.get_state()
    rest = Source(3)
    rest.drawn = state["prompts"]["drawn"]
    with looping(tmp_path / "run", rest, state) as (_, batches, _):
        after = [batch.tokens for batch in batches]
    np.testing.assert_array_equal([*before, *after], expected)


def test_samples_are_kept_for_the_checkpoints_in_the_middle_of_their_updates_alone(tmp_path):
    with looping(tmp_path, Source(2), saved=[2]) as (loop, batches, _):
        files = []
        for _ in range(2 * UPDATES):
            next(batches)
            loop.get_state()
            files.append(sorted(path.name.partition(".")[0] for path in (tmp_path / "experience").glob("*.npz")))
    # After three updates nothing is left to do; step 1 has no checkpoint any more, step 2 still has one.
    assert files == [["1"], ["2"], ["2"], ["2", "4"], ["2", "5"], ["2"]]


def test_every_rollout_is_recorded_under_its_first_update_and_its_metrics_once(tmp_path):
    with looping(tmp_path, Source(2)) as (_, batches, session):
        assert len(list(batches)) == 2 * UPDATES
    assert recorded_steps(tmp_path) == [1, 4]
    first, epoch, second, next_epoch = session.recorded
    assert (first["drawn"], second["drawn"]) == (1, 2)
    assert (epoch, next_epoch) == ({"epoch": 0.25}, {"epoch": 0.5})
    assert second["staleness/mean"] == UPDATES  # sampled by the weights of step 0
