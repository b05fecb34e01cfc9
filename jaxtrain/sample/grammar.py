"""Grammars that a sample follows: JSON schemas, regular expressions and Lark grammars, by the package llguidance.

A matcher of each sample computes on the host which tokens may come next. Therefore a device call generates only one
token while a sample with a grammar runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np


class Matcher(Protocol):
    """The state of one sample."""

    def allowed(self, vocab_size: int) -> np.ndarray:
        """Which tokens may come next, [V] bool. Where the sample may end, its end tokens are among them."""
        ...

    def accept(self, token: int) -> None:
        """Add a token that was allowed."""
        ...


class Grammar(Protocol):
    def matcher(self) -> Matcher:
        """A matcher for a new sample."""
        ...


@dataclass(frozen=True)
class GuidanceGrammar:
    """A grammar in the notation of llguidance, for a tokenizer of `guidance_tokenizer`."""

    tokenizer: Any
    text: str

    def __post_init__(self) -> None:
        from llguidance import LLMatcher

        if problem := LLMatcher.validate_grammar(self.text, self.tokenizer):
            raise ValueError(problem)

    def matcher(self) -> Matcher:
        return _GuidanceMatcher(self)


class _GuidanceMatcher:
    def __init__(self, grammar: GuidanceGrammar):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(grammar.tokenizer, grammar.text, log_level=0)

    def allowed(self, vocab_size: int) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(mask, bitorder="little")[:vocab_size].astype(bool)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {self._matcher.get_error()}")


@lru_cache(maxsize=8)
def guidance_tokenizer(tokenizer: Any, vocab_size: int, end_ids: tuple[int, ...]) -> Any:
    """A transformers tokenizer for grammars; a text that may end ends with one of `end_ids`.

    Raises ValueError if llguidance is not installed.
    """
    if find_spec("llguidance") is None:
        raise ValueError("constrained generation needs llguidance: pip install 'jaxtrain[grammar]'")
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(end_ids))


def json_schema_grammar(tokenizer: Any, schema: dict[str, Any]) -> GuidanceGrammar:
    """JSON that follows a schema, in one line. Raises ValueError for a schema that is invalid or not supported."""
    from llguidance import LLMatcher

    # With white space of any length a model may write nothing else.
    options: Any = {"whitespace_flexible": False}
    return GuidanceGrammar(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def regex_grammar(tokenizer: Any, pattern: str) -> GuidanceGrammar:
    """Text that a regular expression matches as a whole. Raises ValueError for one that is not supported."""
    from llguidance import LLMatcher

    return GuidanceGrammar(tokenizer, LLMatcher.grammar_from_regex(pattern))


def lark_grammar(tokenizer: Any, text: str) -> GuidanceGrammar:
    """A Lark grammar with the extensions of llguidance, such as %json. Raises ValueError for an invalid one."""
    from llguidance import LLMatcher

    return GuidanceGrammar(tokenizer, LLMatcher.grammar_from_lark(text))
