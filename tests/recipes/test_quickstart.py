import json

import pytest

from jaxtrain.recipes.quickstart import first_with


@pytest.mark.parametrize(
    ("share", "expected"), [(0.4, (50, 0.45)), (0.45, (50, 0.45)), (0.5, (100, 0.7)), (0.9, (150, 0.6))]
)
def test_the_first_model_is_the_earliest_that_is_good_enough_or_else_the_last(tmp_path, share, expected):
    matches = {25: 0.1, 50: 0.45, 75: 0.4, 100: 0.7, 150: 0.6}
    lines = [{"step": step, "loss": 1.0} for step in range(1, 151)]
    lines += [{"step": step, "eval_exact_match": match} for step, match in matches.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_with(tmp_path, share) == expected
