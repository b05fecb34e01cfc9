import itertools

import jax
import numpy as np
import pytest
import tiny
from jaxtrain.losses.sft import sft_loss
from jaxtrain.train.loop import NonFiniteError, check_finite, train

from jaxtrain.config import OptimizerSection
from jaxtrain.optim import make_optimizer, make_schedule
from jaxtrain.train.state import new_state
from jaxtrain.train.step import StepReport, make_step
from jaxtrain.types import Batch

GOOD = tiny.packed_batch([[9, 20, 3], [14, 14]], 32)
BAD = GOOD._replace(loss_weights=np.where(GOOD.loss_weights > 0, np.inf, 0).astype(np.float32))


@pytest.fixture(scope="module")
def step_and_state():
    model = tiny.model()
    schedule = make_schedule(OptimizerSection(), 10)
    tx = make_optimizer(OptimizerSection(), schedule, model.axes())
    state = new_state(tiny.random_params(model), {}, tx, jax.random.key(0))
    return jax.jit(make_step(model, tx, schedule, sft_loss, max_grad_norm=1.0)), state


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


def report(in_a_row: int) -> StepReport:
    return StepReport({}, *(np.int32(in_a_row),) * 5)  # type: ignore[arg-type]


def test_batches_of_different_rows_are_saved_with_their_signals(tmp_path):
    """As in reinforcement learning, where every step has the rows that its samples need."""
    batches = []
    for rows in (4, 6, 5):
        ones = np.ones((rows, 8), np.int32)
        signals = {"advantages": np.full((rows, 8), rows, np.float32), "supports": np.ones((rows, 8, 2), np.int32)}
        batches.append(Batch(ones, ones, ones, ones.astype(np.float32), signals))
    batches[0].signals.pop("supports")
    check_finite(report(1), batches, 2, 6, tmp_path)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row up to step 7 .*optimizer\.learning_rate"):
        check_finite(report(2), batches, 2, 7, tmp_path)
    (file,) = tmp_path.iterdir()
    saved = np.load(file)
    assert saved["rows"].tolist() == [4, 6, 5]
    assert saved["tokens"].shape == saved["signals.advantages"].shape == (3, 6, 8)
    assert saved["segment_ids"].sum(axis=(1, 2)).tolist() == [32, 48, 40]
    assert (saved["signals.advantages"][2, :5] == 5).all()
    assert "signals.supports" not in saved


def test_the_last_step_is_looked_at_too(step_and_state, tmp_path):
    with pytest.raises(NonFiniteError):
        taken(step_and_state, [GOOD, BAD, BAD, BAD], tmp_path, steps=4)
