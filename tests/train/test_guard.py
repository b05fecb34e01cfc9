import numpy as np
import pytest

from jaxtrain.train.guard import NonFiniteError, check_finite
from jaxtrain.train.step import StepReport
from jaxtrain.types import Batch


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
