"""Correct and faulty reward functions for the tests of the pool, imported by its worker processes."""

import asyncio
import math
import os
import sys
import time


def length(completions, **_):
    return [float(len(text)) for text in completions]


async def length_later(completions, **_):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


def only_even(completions, **_):
    return [1.0 if len(text) % 2 == 0 else None for text in completions]


def logs(completions, trainer_state, log_metric, log_extra, **_):
    log_metric("mean_length", sum(map(len, completions)) / len(completions))
    log_extra("upper", [text.upper() for text in completions])
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


def raises(completions, **_):
    if "bad" in completions:
        raise RuntimeError("no reward for this")
    return [1.0] * len(completions)


def hangs(completions, **_):
    while "bad" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


def waits(completions, file, **_):
    while "bad" in completions and not os.path.exists(file):
        time.sleep(0.01)
    return [1.0] * len(completions)


def hangs_always(completions, **_):
    time.sleep(3600)


def dies(completions, **_):
    if "bad" in completions:
        os._exit(3)
    return [1.0] * len(completions)


def not_a_number(completions, **_):
    return [math.nan if text == "bad" else 1.0 for text in completions]


def one_too_many(completions, **_):
    return [1.0] * (len(completions) + ("bad" in completions))


def no_jax(completions, **_):
    return [float("jax" not in sys.modules)] * len(completions)


def columns(prompts, completions, completion_ids, answer, bonus, **_):
    return [float(len(p) + len(ids) + a) + bonus for p, ids, a in zip(prompts, completion_ids, answer, strict=True)]


def noisy(completions, **_):
    print("hello from a reward function")
    return [1.0] * len(completions)


def columns_seen(completion_ids, answer, **_):
    return [float(len(ids) + a) for ids, a in zip(completion_ids, answer, strict=True)]


def kinds(prompts, completions, **_):
    """1 for a string completion of a string prompt, 2 for messages."""
    talks = [
        (isinstance(p, str), isinstance(c, str) or c[0]["role"]) for p, c in zip(prompts, completions, strict=True)
    ]
    return [{(True, True): 1.0, (False, "assistant"): 2.0}[talk] for talk in talks]


def raises_always(completions, **_):
    raise RuntimeError("no reward")


def returns_none(completions, **_):
    [1.0] * len(completions)  # a forgotten `return`


def returns_text(completions, **_):
    return ["1.0"] * len(completions)


def infinite(completions, **_):
    return [math.inf] * len(completions)


def needs_topic(completions, topic, **_):
    return [1.0] * len(completions)
