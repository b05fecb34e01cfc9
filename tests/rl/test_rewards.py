import importlib.util

import pytest

from jaxtrain.rl.rewards import exact_answer, format_match, length_penalty, math_equal, repetition_penalty


def said(text):
    return [{"role": "assistant", "content": text}]


def test_exact_answer_takes_strings_and_messages():
    answers = ["48 / 2 = 24\n#### 24", "24", "none", "24"]
    assert exact_answer(["so 24", said("24.0"), "24", "25 or 24 or 26"], answer=answers) == [1, 1, None, 0]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The answer is 5/2", "1/2", 0),
        ("2", "1/2", 0),
        ("0.5", "1/2", 1),
        ("The answer is \u22123", "-3", 1),
        ("The answer is \u22123", "3", 0),
        (r"so \boxed{1{,}000}", "$1,000.", 1),
        ("1e3 in all", "1,000", 1),
        ("50%", "50", 1),
        ("no number", "3", 0),
        ("Paris", "Paris", None),
    ],
)
def test_exact_answer_reads_all_notations_of_a_number(completion, answer, reward):
    assert exact_answer([completion], answer=[answer]) == [reward]


def test_format_match_wants_the_whole_completion():
    pattern = "<think>.*</think>.+"
    assert format_match(["<think>a\nb</think>c", "x<think></think>c", said("<think></think>!")], pattern) == [1, 0, 1]


def test_penalties_grow_with_length_and_repetition():
    assert length_penalty([[0] * 5, [0] * 10, [0] * 15, [0] * 30], max_tokens=10) == [0, 0, -0.5, -2]
    assert repetition_penalty([[1, 2, 3, 4], [7] * 12, [1]], ngram=3) == [0, pytest.approx(-0.9), 0]


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_math_equal_accepts_equivalent_answers():
    completions = [r"so $\frac{1}{2}$", "0.5", r"\boxed{x^2+2x+1}", "it is 3", said("$2$")]
    answers = ["1/2", "1/2", "$(x+1)^2$", "4", "#### 2"]
    assert math_equal(completions, answer=answers) == [1, 1, 1, 0, 1]
