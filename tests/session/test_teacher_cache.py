"""A teacher's largest log-probabilities, computed once."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from recipe_runs import losses, prepare, train


def test_all_but_one_id_give_the_exact_divergence_and_a_stale_cache_is_refused(tmp_path):
    """The rest is then one token, whose probability the bucket has."""
    place = prepare(tmp_path, "distill")
    cut = ["data.max_length=40", "data.overlong=split", "train.steps=3"]
    whole = train(place, "online", *cut)
    cached = [*cut, f"teacher.cache={place / 'cache'}"]
    found = train(place, "cached", *cached, "teacher.top_logps=258")
    np.testing.assert_allclose(losses(found), losses(whole), rtol=1e-3)
    np.testing.assert_allclose(losses(found, "eval_divergence"), losses(whole, "eval_divergence"), rtol=1e-3)
    stored = pq.read_table(place / "cache" / "0.parquet")
    assert stored.column_names == ["teacher_ids", "teacher_logps"] and len(stored) == 40
    with pytest.raises(ValueError, match=r"0.parquet: .* are of another encoder and log-probability: remove the file"):
        train(place, "stale", *cached, "teacher.top_logps=4")
    with pytest.raises(ValueError, match="are of another log-probability"):
        train(place, "stale", *cached, "teacher.top_logps=258", "objective.temperature=2.0")
    with pytest.raises(ValueError, match="=259 must be less"):
        train(place, "stale", *cached, "teacher.top_logps=259")
