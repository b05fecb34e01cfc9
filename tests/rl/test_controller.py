"""The loop over updates with scripted steps: what is looked at after each."""

import numpy as np
import pytest
from jaxtrain.rl.controller import Experience, Learner, Pending, Plan, Roles, reinforce
from jaxtrain.train.loop import NonFiniteError

from jaxtrain.train.step import StepReport
from jaxtrain.types import Batch, TrainState


def learner(skips: bool) -> Learner:
    """Steps that only count; with `skips` all of them are skipped."""

    def step(state, batch):
        taken = state.step + 1
        in_a_row = np.int32(taken if skips else 0)
        return state._replace(step=taken), StepReport({}, *(in_a_row,) * 5)

    zero = np.int32(0)
    return Learner(TrainState(zero, {}, {}, (), zero, zero, zero), step, lambda params, batch: batch.tokens)


def test_a_critic_whose_updates_are_all_skipped_ends_the_run(tmp_path, caplog):
    batches = [Batch(*np.ones((4, rows, 8), np.int32)) for rows in (3, 4)]
    pending = Pending(Experience(batches, {}, []), 0)
    plan = Plan(iterations=4, minibatches=2, max_length=8, row_multiple=1, max_skipped_in_a_row=3)
    roles = Roles(learner(False), critic=learner(True))

    def no_samples(params, number):
        raise AssertionError

    updates = reinforce(
        roles, no_samples, None, plan, lambda batch: batch, steps=8, inspection_dir=tmp_path, pending=pending
    )
    taken = []
    with pytest.raises(NonFiniteError, match=r"3 steps of the critic in a row up to step 3.*rl\.critic\.learning_rate"):
        taken.extend(update.step for update in updates)
    assert taken == [1, 2]
    assert "step 1 of the critic was skipped" in caplog.text
    (file,) = tmp_path.iterdir()
    assert np.load(file)["rows"].tolist() == [3, 4, 3]
