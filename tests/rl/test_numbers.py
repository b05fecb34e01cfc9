import time

import pytest

from jaxtrain.rl.numbers import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 1,234 eggs", 1234),
        ("16 - 3 = 13 eggs.\n#### 18", 18),
        ("#### 18 eggs of 20", 18),
        ("it costs $3.50.", 3.5),
        ("-7", -7),
        ("10-3", 3),
        ("#### 1\n#### 2", 2),
        ("#### nothing after 5", 5),
        ("5 is it\n#### nothing", 5),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1/2", 0.5),
        ("The answer is 5/2", 2.5),
        ("x = -1/2", -0.5),
        (r"\frac{1}{2}", 0.5),
        (r"-\dfrac{3}{4}", -0.75),
        (r"1\frac{1}{2}", 1.5),
        ("it takes 3 1/2 hours", 3.5),
        ("-3 1/2", -3.5),
        ("48 / 2 = 24", 24),
        ("on 1/2/2024", 2024),
        ("1/0", None),
        ("1\u20442", 0.5),
    ],
)
def test_fractions(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is \u22123", -3),
        ("The answer is \u20133", -3),
        ("\u2212$3", -3),
        ("-$5", -5),
        (r"-\$5", -5),
        ("5\u20137", 7),
        ("x = -3", -3),
        ("f(2)-3", 3),
    ],
)
def test_signs(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.50", 1234.5),
        ("$1.000.000", 1_000_000),
        ("1.234.567,89", 1234567.89),
        ("1,23,456", 123456),
        ("1{,}000", 1000),
        (r"1\,000\,000", 1_000_000),
        ("1\u202f000\u202f000", 1_000_000),
        ("1'000", 1000),
        ("1_000_000", 1_000_000),
        ("1.000", 1),
        ("3 , 4", 4),
        ("3,4", 4),
        ("1,2.5", 2.5),
        ("1234,567", 567),
    ],
)
def test_thousands_separators_and_lists(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12.", 12),
        ("It is 12.0.", 12),
        (".5", 0.5),
        ("50%", 50),
        (r"50\%", 50),
        ("$18", 18),
        ("\\$18", 18),
        ("It is 1e5", 100_000),
        ("1.5E-3", 0.0015),
        ("1.5 x 10^3", 1500),
        (r"2 \times 10^{-2}", 0.02),
        ("1e999", None),
        ("9" * 5000, None),
        (r"\boxed{42} in 3 steps", 42),
        (r"\boxed{\frac{1}{2}}, not 7", 0.5),
        (r"first \boxed{1}, then \boxed{x = 2} of 3", 2),
        (r"\boxed{unclosed 4", 4),
        (r"\boxed{x} 6", 6),
        ("#### \\boxed{7} of 9", 7),
    ],
)
def test_units_exponents_and_boxes(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("piece", ["9", "12,", "1.", "1/2", "1 ", "\\boxed{", "\\frac{1", "$-", "1e", "1 x 10^", "{1}"])
def test_long_texts_take_linear_time(piece):
    start = time.perf_counter()
    final_number(piece * 20_000)
    assert time.perf_counter() - start < 2
