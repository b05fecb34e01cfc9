"""The reward worker's checks of a function's arguments and values."""

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
    assert call_reward(lambda **_: values, ARGUMENTS)[:2] == ([1.0], "")
    assert call_reward(lambda **_: [None], ARGUMENTS)[:2] == ([None], "")


def test_coroutines_are_awaited():
    async def later(completions, **_):
        await asyncio.sleep(0.001)
        return [2.0]

    assert call_reward(later, ARGUMENTS)[:2] == ([2.0], "")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("raises_always", "RuntimeError: no reward"),
        ("returns_none", "TypeError: it must return a list of numbers, one per sample, not NoneType"),
        ("returns_text", "TypeError: a reward must be a number or None, not str"),
        (
            "needs_topic",
            "ValueError: it needs 'topic', which is neither a column of the data nor one of `args`; available are "
            "'prompts', 'completions', 'completion_ids'",
        ),
    ],
)
def test_a_failure_has_a_message(function, expected):
    assert call_reward(load_named(f"{HERE}:{function}", "rl.rewards"), ARGUMENTS)[:2] == (None, expected)


def test_a_builtin_without_a_signature_can_be_called():
    values, message, *_ = call_reward(max, ARGUMENTS)
    assert values is None and message.startswith("TypeError")


def test_trls_further_arguments_are_given_to_functions_that_take_them():
    """As TRL's `_calculate_rewards` passes them: by keyword, to all functions."""

    def shaped(prompts, completions, trainer_state, log_extra, log_metric, **columns):
        log_metric("half", 0.5)
        log_extra("text", [np.float32(1)] * len(completions))
        return [trainer_state.global_step / trainer_state.max_steps]

    state = {"global_step": 3, "max_steps": 12}
    call = call_reward(shaped, ARGUMENTS, state)
    assert (call.values, call.message) == ([0.25], "")
    assert call.metrics == [("half", 0.5)] and call.extra == {"text": ["1.0"]}
    assert call_reward(lambda completions: [1], ARGUMENTS | {}, state).message.startswith("TypeError")
    assert call_reward(lambda prompts, completions, completion_ids: [1], ARGUMENTS, state).values == [1.0]
    own = call_reward(lambda log_metric, **_: [log_metric[0]], ARGUMENTS | {"log_metric": [7]}, state)
    assert own.values == [7.0]  # a column of that name


def test_extra_values_are_one_per_sample():
    call = call_reward(lambda log_extra, **_: log_extra("text", ["a", "b"]), ARGUMENTS)
    assert call.values is None and call.message == "ValueError: log_extra('text') has 2 values for 1 samples"
