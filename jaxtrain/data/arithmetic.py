"""Conversations about sums and differences, worked digit by digit: the training data of the quickstart."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Files(NamedTuple):
    """The paths of the two files."""

    train: Path
    eval: Path


def write_arithmetic(out_dir: str | Path, train_rows: int, eval_rows: int, seed: int, *, digits: int = 2) -> Files:
    """Write `train.jsonl` and `eval.jsonl`, each a conversation per line; no problem is in both files.

    Problems have numbers of up to `digits` digits and are all different. Raises ValueError where more rows than half of
    such problems are asked for.
    """
    numbers = 10**digits
    available = numbers**2 + numbers * (numbers + 1) // 2
    if train_rows + eval_rows > available // 2:
        raise ValueError(
            f"{train_rows} + {eval_rows} rows: only {available} problems have numbers of {digits} digits, and at most "
            "half of them are drawn, so that the held-out ones are not forced by the others"
        )
    problems = _problems(train_rows + eval_rows, seed, digits)
    return _write_files(out_dir, [problem_row(*problem) for problem in problems], eval_rows)


def write_arithmetic_pairs(out_dir: str | Path, train_rows: int, eval_rows: int, seed: int) -> Files:
    """Write `train.jsonl` and `eval.jsonl` as `write_arithmetic` does, of preferences: the worked answer over one with
    a mistake in a step."""
    rng = np.random.default_rng(seed)
    rows = []
    for problem in _problems(train_rows + eval_rows, seed, 2):
        question, answer = problem_row(*problem)["messages"]
        wrong = answer | {"content": _with_mistake(answer["content"], rng)}
        rows.append({"prompt": [question], "chosen": [answer], "rejected": [wrong]})
    return _write_files(out_dir, rows, eval_rows)


def _problems(count: int, seed: int, digits: int) -> list[tuple[int, str, int]]:
    numbers = 10**digits
    rng = np.random.default_rng(seed)
    problems: dict[tuple[int, str, int], None] = {}
    while len(problems) < count:
        a, b = (int(number) for number in rng.integers(0, numbers, 2))
        sign = "+" if rng.random() < 0.5 else "-"
        problems[(a, sign, b) if sign == "+" or a >= b else (b, sign, a)] = None
    return list(problems)


def _with_mistake(answer: str, rng: np.random.Generator) -> str:
    """A worked answer whose first step or result is off by one or two; a wrong step gives a wrong result."""
    digits = [at for at, character in enumerate(answer) if character.isdigit()]
    result = [at for at in digits if at > answer.rindex(" ")]
    step = [at for at in digits if at == answer.index("=") + 1]
    changed = list(answer)
    for at in (result[-1], *(step if rng.random() < 0.5 else ())):
        changed[at] = str((int(changed[at]) + int(rng.integers(1, 3))) % 10)
    return "".join(changed)


def _write_files(out_dir: str | Path, rows: list[dict[str, list[dict[str, str]]]], eval_rows: int) -> Files:
    files = Files(Path(out_dir) / "train.jsonl", Path(out_dir) / "eval.jsonl")
    files.train.parent.mkdir(parents=True, exist_ok=True)
    _write(files.eval, rows[:eval_rows])
    _write(files.train, rows[eval_rows:])
    return files


def problem_row(a: int, sign: str, b: int) -> dict[str, list[dict[str, str]]]:
    """The row of the problem `a sign b`, with `sign` "+" or "-" and a >= b for "-". The answer ends with the result."""
    steps, result = _sum(a, b) if sign == "+" else _difference(a, b)
    answer = f"{', '.join(steps)}. The answer is {result}"
    return {
        "messages": [
            {"role": "user", "content": f"What is {a} {sign} {b}?"},
            {"role": "assistant", "content": answer},
        ]
    }


def _sum(a: int, b: int) -> tuple[list[str], int]:
    """The steps `x+y+carry=total` from the units on, and a + b."""
    steps, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return steps, a + b


def _difference(a: int, b: int) -> tuple[list[str], int]:
    """The steps `x-y-borrow=digit` from the units on, and a - b."""
    steps, borrow = [], 0
    for x, y in _columns(a, b):
        lent = 10 if x - y - borrow < 0 else 0
        steps.append(f"{x + lent}-{y}-{borrow}={x + lent - y - borrow}")
        borrow = lent // 10
    return steps, a - b


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of two numbers, units first, as many as the longer one has."""
    places = max(len(str(a)), len(str(b)))
    return [(a // 10**place % 10, b // 10**place % 10) for place in range(places)]


def _write(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
