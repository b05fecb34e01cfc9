"""The metrics of a run over its steps."""

import pytest

from jaxtrain.observe.history import better, read_series


def test_series_have_the_steps_with_a_finite_value_and_half_a_line_is_left_out(tmp_path):
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": null, "lr": 0.5}', '{"step": 3, "loss": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    series = read_series(tmp_path)
    assert series["loss"].steps == [1, 3] and series["loss"].values == [3.0, 2.0]
    assert series["lr"].steps == [2] and list(series) == ["loss", "lr"]
    assert series["loss"].best("min") == (3, 2.0) and series["loss"].best("max") == (1, 3.0)
    assert read_series(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("eval_loss", "min"),
        ("eval_perplexity", "min"),
        ("eval_rewards/exact_answer", "max"),
        ("eval_exact_match", "max"),
        ("reward", "max"),
        ("reward_std", None),
        ("eval_rewards/lost", None),
        ("time/reward", None),
        ("entropy", None),
        ("completions/mean_length", None),
    ],
)
def test_the_better_value_of_a_metric_is_known_by_its_name(name, mode):
    assert better(name) == mode
