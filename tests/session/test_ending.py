"""What a run says at its end."""

import json
from types import SimpleNamespace

from jaxtrain.session.ending import end_facts, trained_text, warn_of_early_end


def test_a_run_that_ends_early_is_warned_of(caplog):
    metrics = {"epoch": 2.0, "data/examples": 1200.0, "num_tokens": 34567.0, "learning_rate": 1e-4}
    assert trained_text(10, 10, metrics) == "trained 10 of 10 steps, 2.00 epochs, 1,200 examples, 34,567 tokens"
    warn_of_early_end(10, 10, metrics, "the data was exhausted")
    assert caplog.text == ""
    warn_of_early_end(4, 10, metrics, "the data was exhausted")
    assert "exhausted after step 4 of 10: the learning rate was still 0.0001" in caplog.text


def test_only_rows_that_were_cut_or_refused_are_named():
    metrics = {"data/truncated": 0.0, "data/bad_rows": 3.0}
    assert trained_text(4, 10, metrics) == "trained 4 of 10 steps, 3 bad rows"


def test_the_best_values_and_the_best_checkpoint_are_named(tmp_path):
    lines = [
        {"step": step, "eval_loss": loss, "eval_loss_std_error": 0.1, "entropy": 1.0}
        for step, loss in ((2, 3.0), (4, 1.5), (6, 2.0))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SimpleNamespace(recipe="sft", eval=SimpleNamespace(best=None), run=SimpleNamespace(dir="runs/a"))
    facts = dict(end_facts(config, tmp_path, {"steps": 90.0, "saving": 30.0}, [4, 6], 4))
    assert facts["eval_loss"] == "2.0000 ± 0.1000 (first 3.0000, best 1.5000 at step 4)"
    assert "entropy" not in facts and "eval_loss_std_error" not in facts
    assert facts["time"] == "0:02:00: steps 0:01:30, saving 0:00:30"
    assert facts["checkpoints"].endswith("checkpoints: 4 (best), 6")
    assert facts["next"] == "jaxtrain chat runs/a (or generate, serve); jaxtrain export runs/a OUT --best"
