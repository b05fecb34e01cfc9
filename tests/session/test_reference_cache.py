"""Log-probabilities of the reference, computed once."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from recipe_runs import losses, train


def test_the_same_run_with_it_and_a_stale_one_is_refused(preference_run, tmp_path):
    place, whole = preference_run
    cache = tmp_path / "cache"
    found = train(place, "cached", f"reference.cache={cache}")
    np.testing.assert_allclose(losses(found), losses(whole), rtol=2e-5)
    np.testing.assert_allclose(losses(found, "eval_loss"), losses(whole, "eval_loss"), rtol=2e-5)
    stored = pq.read_table(cache / "0.parquet")
    assert stored.column_names == ["ref_chosen_logps", "ref_rejected_logps"] and len(stored) == 40
    with pytest.raises(ValueError, match=r"0.parquet: .* are of another data.cut: remove the file"):
        train(place, "stale", f"reference.cache={cache}", "data.max_length=80")
    with pytest.raises(ValueError, match="are of another model"):
        train(place, "stale model", f"reference.cache={cache}", "run.seed=1")


def test_log_probabilities_of_a_quantized_base_are_its_own(preference_run, tmp_path):
    place, _ = preference_run
    lora = [f"reference.cache={tmp_path / 'cache'}", "model.lora.rank=2", "train.steps=1", "data.eval=null"]
    train(place, "not quantized", *lora)
    with pytest.raises(ValueError, match="are of another model"):
        train(place, "quantized", *lora, "model.quantize=int8")
