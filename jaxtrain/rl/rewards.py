"""Ready reward functions, in TRL's signature, so that one written for TRL runs here and the other way round.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

Every argument is a list with one entry per sample: the prompt as it stands in the data, the completion (a string, or
a list with one assistant message where the prompt is a conversation), its token ids, and the row's other columns.
None says that the function does not apply to that sample. A function may be `async`. Keywords from the config's `args`
arrive beside the columns. `reward_pool` runs them in processes of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

_NUMBER = re.compile(r"(?:(?<![\d)])-)?\$?\d[\d,]*(?:\.\d+)?")


def text_of(completion: Any) -> str:
    """A completion as text, whether it is a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion if message["role"] == "assistant")


def final_number(text: str) -> float | None:
    """The number after the last `####` (GSM8K's mark), else the last number of the text; None where there is none."""
    found = _NUMBER.findall(text.rpartition("####")[2]) if "####" in text else []
    number = found[0] if found else next(reversed(_NUMBER.findall(text)), None)
    return None if number is None else float(number.replace(",", "").replace("$", ""))


def exact_answer(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the final number is that of the column `answer`, else 0; None where `answer` holds no number."""

    def one(completion: Any, right: str) -> float | None:
        wanted = final_number(str(right))
        return None if wanted is None else float(final_number(text_of(completion)) == wanted)

    return [one(*pair) for pair in zip(completions, answer, strict=True)]


def format_match(completions: Sequence[Any], pattern: str, **_: Any) -> list[float]:
    """1 where the whole completion matches the regular expression `pattern` (a dot matches line breaks too)."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def length_penalty(completion_ids: Sequence[Sequence[int]], most: int, **_: Any) -> list[float]:
    """0 up to `most` tokens, then falling by 1 with every further `most` tokens."""
    return [-max(len(ids) - most, 0) / most for ids in completion_ids]


def repetition_penalty(completion_ids: Sequence[Sequence[int]], ngram: int = 3, **_: Any) -> list[float]:
    """Minus the share of repeated n-grams of tokens: 0 where all are different, towards -1 where all are one.

    After Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning" (arXiv:2502.03373), with tokens for words.
    """

    def one(ids: Sequence[int]) -> float:
        grams = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return [one(ids) for ids in completion_ids]


def math_equal(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float | None]:
    """1 where the completion's mathematics equals that of `answer`, by math-verify; None where `answer` has none.

    The library's own time limits are signals, which work in a main thread only; the pool's limit replaces them.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("the reward math_equal needs math-verify: pip install 'jaxtrain[math]'")
    library: Any = importlib.import_module("math_verify")

    def one(completion: Any, right: str) -> float | None:
        right = str(right).rpartition("####")[2].strip()
        gold = library.parse(right if "\\" in right or "$" in right else f"${right}$", parsing_timeout=None)
        if not gold:
            return None
        given = library.parse(text_of(completion), parsing_timeout=None)
        return float(library.verify(gold, given, timeout_seconds=None))

    return [one(*pair) for pair in zip(completions, answer, strict=True)]
