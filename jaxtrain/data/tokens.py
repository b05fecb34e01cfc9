"""Texts -> token ids and the loss weights of the tokens, by character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxtrain.data.tracing import Span


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


def token_weights(offsets: list[Span], spans: Sequence[tuple[int, int, int, float]], outside: float) -> np.ndarray:
    """Weights [n] float32 of tokens at `offsets`.

    A token has the weight of the span (.., start, end, weight) that holds its first character, else `outside`.

    A token that straddles the beginning of a span is not in it: the model never gets to choose that token, because the
    prompt before the span is tokenised on its own when the model is asked.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.full(len(starts), outside, np.float32)
    for _, start, end, weight in spans:
        weights[(starts >= start) & (starts < end) & (ends > start)] = weight
    return weights
