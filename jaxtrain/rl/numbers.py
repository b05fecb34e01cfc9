"""Extracts the final number of a text, in the notations that people and models use."""

import math
import re

_MINUS = str.maketrans(dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-") | {"\u2044": "/"})
# Between groups of three digits: LaTeX's `{,}` and `\,`, no-break and thin spaces, an apostrophe, an underscore.
_THOUSANDS = re.compile(r"(?<=\d)(?:\\,|\{,\}|[\u00a0\u202f\u2009'\u2019_])(?=\d{3}(?!\d))")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_NUMBER = re.compile(
    r"(?P<minus>(?<![\d)\]}])-\s?(?=\\?\$)|(?<![\d)\]}])-)?(?:\\?\$)?"  # a minus after a digit or bracket subtracts
    r"(?P<digits>\d+(?:[.,]\d+)*|(?<![\w.,])\.\d+)"
    r"(?P<exponent>[eE][+-]?\d+(?!\w))?"
    r"(?:\s*(?:\*|x|\u00d7|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>-?\d+)\}?)?"
    r"(?:(?P<numerator>\x20\d+)?/(?P<divisor>\d+(?:[.,]\d+)*)(?![\d/]))?"
)
_PLAIN = re.compile(r"\d*\.\d+|\d+")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?")  # 1,234.5; by twos in India: 1,23,456
_GROUPED_BY_DOTS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?")  # 1.234.567,8; a single dot is decimal


def final_number(text: str) -> float | None:
    r"""The final number of a text, or None.

    It is the first number after the last `####` (GSM8K's marker), else the last one inside the last `\boxed{}`, else
    the last one of the text.

    Numbers may have thousands separators (1,234 and 1.234.567), be fractions (1/2, \frac{1}{2}, 3 1/2), and have
    exponents (1e3, 1.5 x 10^3) or a Unicode minus. The units `$` and `%` and a final period are ignored. Digits with a
    comma that does not separate thousands are two numbers: "3,4" ends with 4.
    """
    text = _THOUSANDS.sub(",", text.translate(_MINUS))
    text = _FRAC.sub(
        lambda match: f" {match[1]}/{match[2]}" if _follows_digit(match) else f"{match[1]}/{match[2]}", text
    )
    if "####" in text:
        after_mark = _numbers(text.rpartition("####")[2])
        if after_mark:
            return after_mark[0]
    boxed = _numbers(_last_boxed(text))
    if boxed:
        return boxed[-1]
    return next(reversed(_numbers(text)), None)


def _follows_digit(match: re.Match[str]) -> bool:
    return match.start() > 0 and match.string[match.start() - 1].isdigit()


def _last_boxed(text: str) -> str:
    r"""The content of the last `\boxed{...}`, which may have nested braces; an empty string if there is none."""
    _, mark, rest = text.rpartition("\\boxed{")
    depth = 1
    for position, character in enumerate(rest if mark else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return ""


def _numbers(text: str) -> list[float]:
    found: list[float] = []
    for match in _NUMBER.finditer(text):
        values = _values(match["digits"])
        if match["minus"]:
            values[0] = -values[0]
        if match["exponent"]:
            values[-1] *= _power(match["exponent"][1:])
        if match["power"]:
            values[-1] *= _power(match["power"])
        if match["divisor"] and text[max(match.start("digits") - 1, 0)] == "/":  # the end of a date: 1/2/2024
            values += _values(match["divisor"])
        elif match["divisor"]:
            _divide(values, match["numerator"], match["divisor"])
        found += [value for value in values if math.isfinite(value)]
    return found


def _divide(values: list[float], numerator: str | None, divisor: str) -> None:
    """Divide the last value by the divisor, or add a fraction to it if it is the integer of a mixed number (3 1/2)."""
    denominator = _values(divisor)[0]
    if numerator is None:
        values[-1] = values[-1] / denominator if denominator else math.nan
        return
    fraction = float(numerator) / denominator if denominator else math.nan
    if 0 < fraction < 1 and values[-1].is_integer():
        values[-1] += math.copysign(fraction, values[-1])
    else:
        values.append(fraction)


def _values(digits: str) -> list[float]:
    """The value of the digits if they are one number, else those of the numbers in the list."""
    if _PLAIN.fullmatch(digits):
        return [float(digits)]
    if _GROUPED.fullmatch(digits):
        return [float(digits.replace(",", ""))]
    if _GROUPED_BY_DOTS.fullmatch(digits):
        return [float(digits.replace(".", "").replace(",", "."))]
    return [float(piece) for part in digits.split(",") for piece in _PLAIN.findall(part)]


def _power(exponent: str) -> float:
    """10 to the exponent; infinite if it exceeds a float."""
    return float(f"1e{exponent}")
