"""Built-in reward functions. They have TRL's signature, so functions can be shared with TRL.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Every argument is a list with one entry per sample: the prompt as in the data, the completion (a string, or
a list with one assistant message where the prompt is a conversation), its token ids, and the row's other columns.
None means that the function does not apply to that sample. A function may be `async`. The config's `args` are
passed as further keywords. `reward_pool` runs them in separate processes.
"""

import importlib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from jaxtrain.rl.numbers import final_number


def text_of(completion: Any) -> str:
    """A completion as text, whether it is a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion if message["role"] == "assistant")


def exact_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 if the final number equals that of the column `answer`, else 0; None if `answer` has no number.

    `numbers.final_number` defines the final number and its notations.
    """

    def one(completion: Any, expected: str) -> float | None:
        number = final_number(str(expected))
        return None if number is None else float(final_number(text_of(completion)) == number)

    return [one(*pair) for pair in zip(completions, answer, strict=True)]


def format_match(completions: Sequence[Any], pattern: str, **_: Any) -> list[float]:
    """1 if the entire completion matches the regular expression `pattern` (a dot also matches line breaks), else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def length_penalty(completion_ids: Sequence[Sequence[int]], max_tokens: int, **_: Any) -> list[float]:
    """0 up to `max_tokens` tokens, then decreasing by 1 with every further `max_tokens`."""
    return [-max(len(ids) - max_tokens, 0) / max_tokens for ids in completion_ids]


def repetition_penalty(completion_ids: Sequence[Sequence[int]], ngram: int = 3, **_: Any) -> list[float]:
    """Minus the share of repeated n-grams of tokens: 0 if all are different, close to -1 if all are equal.

    After Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning" (arXiv:2502.03373), with tokens for words.
    """

    def one(ids: Sequence[int]) -> float:
        grams = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return [one(ids) for ids in completion_ids]


def math_equal(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 if the completion is mathematically equal to `answer`, by math-verify; None if `answer` cannot be parsed.

    The library's time limits use signals, which need the main thread; the pool's limit replaces them.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("the reward math_equal needs math-verify: pip install 'jaxtrain[math]'")
    library: Any = importlib.import_module("math_verify")

    def one(completion: Any, expected: str) -> float | None:
        expected = str(expected).rpartition("####")[2].strip()
        gold = library.parse(expected if "\\" in expected or "$" in expected else f"${expected}$", parsing_timeout=None)
        if not gold:
            return None
        answer_given = library.parse(text_of(completion), parsing_timeout=None)
        return float(library.verify(gold, answer_given, timeout_seconds=None))

    return [one(*pair) for pair in zip(completions, answer, strict=True)]
