"""Texts -> token ids and the loss weights of the tokens, by character offsets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.tracing import TextSpan


def without_limits(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The `tokenizers.Tokenizer` inside, told not to pad or cut whatever its file says: packing does both."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def encode(backend: Any, text: str, *, add_special_tokens: bool) -> Any:
    """The `tokenizers.Encoding` of a text. Raises ValueError for a lone surrogate, which no UTF-8 text holds."""
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeError) as error:
        at = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if at is None:
            raise
        raise ValueError(
            f"the text holds a lone surrogate, U+{ord(text[at]):04X}, which is half of a character: "
            f"...{text[max(at - 20, 0) : at + 1]!a}"
        ) from error


def token_weights(
    text: str, offsets: list[TextSpan], spans: Sequence[tuple[int, int, float]], outside: float
) -> np.ndarray:
    """Weights [n] float32 of the tokens of `text` at `offsets`.

    A token has the weight of the span (start, end, weight) that holds its first character, else `outside`. One that
    begins before a span and holds words of it (" Paris" where the prompt ends with a space) has the span's weight, so
    that no word is lost. One that holds only white space of it has not: the prompt ends with a separate token there.
    """
    starts = [start for start, _ in offsets]  # ascending
    weights = np.full(len(starts), outside, np.float32)
    for start, end, weight in spans:
        first = before = bisect_left(starts, start)
        while first < len(starts) and offsets[first][1] <= start:  # of no characters
            first += 1
        weights[first : max(bisect_left(starts, end), first)] = weight
        while before and offsets[before - 1][1] > start:
            before -= 1
            if text[start : offsets[before][1]].strip():
                weights[before] = weight
    return weights


def encode_plain(tokenizer: PreTrainedTokenizerFast, backend: Any, text: str) -> tuple[list[int], list[TextSpan]]:
    """The ids of plain text and their offsets, with the special tokens that the tokenizer adds. A beginning-of-sequence
    token that the text itself begins with is not added once more."""
    encoding = encode(backend, text, add_special_tokens=True)
    doubled = encoding.ids[:2] == [tokenizer.bos_token_id] * 2 and text.startswith(str(tokenizer.bos_token))
    return encoding.ids[doubled:], encoding.offsets[doubled:]
