import itertools

import jax
import numpy as np
import pytest
import tiny

from jaxtrain.config import OptimizerSection
from jaxtrain.objectives.sft import SFT
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.train.loop import NonFiniteError, train
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_step

GOOD = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
BAD = GOOD._replace(loss_weights=np.where(GOOD.loss_weights > 0, np.inf, 0).astype(np.float32))


@pytest.fixture(scope="module")
def step_and_state():
    model = tiny.model()
    schedule = make_schedule(OptimizerSection(), 10)
    tx = make_optimizer(OptimizerSection(), schedule, model.axes())
    state = new_state(tiny.random_params(model), {}, tx, jax.random.key(0))
    return jax.jit(make_step(model, tx, schedule, SFT(), max_grad_norm=1.0)), state


def taken(step_and_state, batches, tmp_path, steps=10):
    step, state = step_and_state
    results = train(
        step, state, iter(batches), lambda batch: batch, steps=steps, max_skipped_in_a_row=3, inspection_dir=tmp_path
    )
    return [result.step for result in results]


def test_takes_as_many_steps_as_asked_and_no_batch_more(step_and_state, tmp_path):
    batches = itertools.repeat(GOOD, 7)
    assert taken(step_and_state, batches, tmp_path, steps=5) == [1, 2, 3, 4, 5]
    assert len(list(batches)) == 2


def test_ends_where_the_data_end(step_and_state, tmp_path, caplog):
    assert taken(step_and_state, [GOOD] * 3, tmp_path) == [1, 2, 3]
    assert "ran dry after step 3 of 10" in caplog.text


def test_scattered_bad_steps_are_skipped_and_said(step_and_state, tmp_path, caplog):
    batches = [GOOD, BAD, BAD, GOOD, BAD, GOOD]
    assert taken(step_and_state, batches, tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [record.args for record in caplog.records if "not finite" in record.msg] == [(2, 1), (3, 2), (5, 1)]
    assert not list(tmp_path.iterdir())


def test_too_many_bad_steps_in_a_row_end_the_run_with_their_batches_saved(step_and_state, tmp_path):
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 4"):
        taken(step_and_state, [GOOD, BAD, BAD, BAD, GOOD, GOOD], tmp_path)
    (file,) = tmp_path.iterdir()
    saved = np.load(file)["loss_weights"]
    assert sum(not np.isfinite(batch).all() for batch in saved) == 3


def test_the_last_step_is_looked_at_too(step_and_state, tmp_path):
    with pytest.raises(NonFiniteError):
        taken(step_and_state, [GOOD, BAD, BAD, BAD], tmp_path, steps=4)
