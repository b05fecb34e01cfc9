"""The best checkpoint is kept, the run ends when nothing gets better, and a resumed run knows both."""

import pytest
from recipe_runs import prepare, train

from jaxtrain.config.evaluation import BestSection
from jaxtrain.session.best import BestEvaluation
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.record import best_step


def test_the_best_value_and_patience():
    best = BestEvaluation(BestSection(metric="eval_accuracy", mode="max", patience=2))
    for step, value in enumerate([0.2, float("nan"), 0.5, 0.5], 1):
        best.update(step, {"eval_accuracy": value})
        assert not best.ends_run
    resumed = BestEvaluation(BestSection(metric="eval_accuracy", mode="max", patience=2))
    resumed.restore(best.state())
    assert (resumed.step, resumed.value) == (3, 0.5)
    resumed.update(5, {"eval_accuracy": 0.4})
    assert resumed.ends_run and "not better than 0.5 of step 3 in 2 evaluations" in resumed.reason
    best.update(5, {"eval_loss": 1.0})  # such as of a reward that failed for all answers: no better
    assert best.ends_run and (best.step, best.value) == (3, 0.5)
    unknown = BestEvaluation(BestSection(metric="eval_accuracy", mode="max"))
    with pytest.raises(ValueError, match=r"eval\.best\.metric=eval_accuracy is no metric of an evaluation: eval_loss"):
        unknown.update(5, {"eval_loss": 1.0})


def test_a_target_ends_the_run():
    for mode, values, target in (("max", [0.2, 0.45], 0.45), ("min", [3.0, 1.5], 2.0)):
        best = BestEvaluation(BestSection(metric="eval_x", mode=mode, target=target))
        assert not best.ends_run
        for step, value in enumerate(values, 1):
            assert not best.ends_run
            best.update(step, {"eval_x": value})
        assert best.ends_run and best.step == 2 and "eval_x reached" in best.reason
        resumed = BestEvaluation(BestSection(metric="eval_x", mode=mode, target=target))
        resumed.restore(best.state())
        assert resumed.ends_run


def test_without_the_section_nothing_is_kept():
    best = BestEvaluation(None)
    best.update(1, {})
    assert best.step is None and not best.ends_run


def test_a_run_ends_early_and_keeps_its_best_checkpoint(tmp_path, capsys):
    """With a far too large rate the first evaluation stays the best one."""
    place = prepare(tmp_path)
    options = ["train.steps=30", "eval.every=1", "checkpoint={every: 100, keep: 1}", "optimizer.learning_rate=3.0"]
    options += ["eval.best={metric: eval_rewards/chosen, mode: max, patience: 3}", "eval.batches=1"]
    lines = train(place, "run", *options)
    values = [line["eval_rewards/chosen"] for line in lines if "eval_rewards/chosen" in line]
    best = values.index(max(values)) + 1
    assert len(values) == best + 3 < 30
    assert best_step(place / "run") == best and checkpoint_steps(place / "run") == [best, best + 3]
    train(place, "run", *options)
    assert "was not better than" in capsys.readouterr().out
