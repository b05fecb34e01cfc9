"""What the process of the rewards makes of a function's arguments and values."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from jaxtrain.named import load_named
from jaxtrain.rl.reward_worker import call_reward

HERE = Path(__file__).parent / "reward_functions.py"
ARGUMENTS = {"prompts": ["?"], "completions": ["a"], "completion_ids": [[1]]}


@pytest.mark.parametrize("values", [[1], (1.0,), np.array([1.0], np.float32), [np.float32(1)], [True], iter([1.0])])
def test_numbers_of_any_kind_are_rewards(values):
    assert call_reward(lambda **_: values, ARGUMENTS) == ([1.0], "")
    assert call_reward(lambda **_: [None], ARGUMENTS) == ([None], "")


def test_coroutines_are_awaited():
    async def later(completions, **_):
        await asyncio.sleep(0.001)
        return [2.0]

    assert call_reward(later, ARGUMENTS) == ([2.0], "")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("raises_always", "RuntimeError: no reward"),
        ("returns_none", "TypeError: it must return a list of numbers, one per sample, not NoneType"),
        ("returns_text", "TypeError: a reward must be a number or None, not str"),
        (
            "needs_topic",
            "ValueError: it needs 'topic', which is neither a column of the data nor one of `args`; there are "
            "'prompts', 'completions', 'completion_ids'",
        ),
    ],
)
def test_a_failure_says_what_is_wrong(function, expected):
    assert call_reward(load_named(f"{HERE}:{function}", "rl.rewards"), ARGUMENTS) == (None, expected)


def test_a_builtin_without_a_signature_can_be_called():
    values, message = call_reward(max, ARGUMENTS)
    assert values is None and message.startswith("TypeError")
