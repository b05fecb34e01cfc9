"""Answers to held-out prompts, judged by exact match or by rewards, in a recipe without rewards of its own."""

import pytest
from recipe_runs import prepare, train


@pytest.fixture
def place(tmp_path):
    return prepare(tmp_path)


def test_answers_are_judged_while_it_trains(place):
    answers = ["eval={every: 1, generate: 4, max_new_tokens: 3}", "train.steps=1"]
    assert train(place, "matched", *answers)[-1]["eval_exact_match"] == 0
    judged = ["eval.samples=2", "eval.temperature=1.0", "eval.rewards=[{function: exact_answer}]"]
    metrics = train(place, "judged", *answers, *judged)[-1]
    names = {"eval_rewards/exact_answer", "eval_rewards/exact_answer/pass@2", "eval_rewards/exact_answer/maj@2"}
    assert names < metrics.keys() and f"{min(names)}_std_error" in metrics
