"""Texts -> token ids, their places in the text, and from these the loss weights of the tokens."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unicodedata import is_normalized

import numpy as np
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def without_limits(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The `tokenizers.Tokenizer` inside, with padding and truncation turned off, since packing does both."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def encode(backend: Any, text: str, *, add_special_tokens: bool) -> Any:
    """The `tokenizers.Encoding` of a text. Raises ValueError for a lone surrogate, which no UTF-8 text holds."""
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeError) as error:
        raise _with_surrogate_named(error, text) from error


def _with_surrogate_named(error: Exception, text: str) -> ValueError:
    """The error of encoding a text as a ValueError that shows its lone surrogate. Raises `error` if it has none."""
    at = next((at for at, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
    if at is None:
        raise error
    return ValueError(
        f"the text holds a lone surrogate, U+{ord(text[at]):04X}, which is half of a character: "
        f"...{text[max(at - 20, 0) : at + 1]!a}"
    )


class LocatedTokens(NamedTuple):
    """The n tokens of a text, and which part of it each stands for."""

    ids: np.ndarray  # [n] int32
    starts: np.ndarray  # [n], ascending, in characters, or in bytes where `text` holds the UTF-8
    ends: np.ndarray  # [n]
    text: str | bytes

    def places(self, characters: Sequence[int]) -> list[int]:
        """Numbers of characters of the text as `starts` and `ends` count."""
        if isinstance(self.text, str):
            return list(characters)
        text = self.text.decode()
        return [len(text[:number].encode()) for number in characters]


class TokenLocator:
    """Encodes texts and locates their tokens.

    The tokens of byte-level BPE are bytes of the text, so their places follow from their lengths, and the tokenizer
    need not be asked for offsets, which take it a third of its time. Its own offsets also leave out white space where
    `trim_offsets` is set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = without_limits(tokenizer)
        self._lengths = _byte_lengths(self._backend)
        self._composed = self._backend.normalizer is not None

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> LocatedTokens:
        """Special tokens that are added have no part of the text. Raises ValueError for a lone surrogate."""
        if self._lengths is not None and not (self._composed and not is_normalized("NFC", text)):
            try:
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                written = text.encode()
            except (TypeError, UnicodeError) as error:
                raise _with_surrogate_named(error, text) from error
            ids = np.array(encoding.ids, np.int32)
            lengths = self._lengths[ids]
            if add_special_tokens:
                lengths[np.array(encoding.special_tokens_mask, bool)] = 0
            ends = lengths.cumsum()
            if len(written) == (ends[-1] if len(ends) else 0):
                return LocatedTokens(ids, ends - lengths, ends, text if len(text) == len(written) else written)
        return by_offsets(text, encode(self._backend, text, add_special_tokens=add_special_tokens))


def by_offsets(text: str, encoding: Any) -> LocatedTokens:
    """The tokens at the offsets of the tokenizer. Added ones, without a place, follow the last."""
    starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    starts = np.maximum.accumulate(starts)
    return LocatedTokens(np.array(encoding.ids, np.int32), starts, np.maximum(ends, starts), text)


_NO_BYTES = -(1 << 40)  # of a token whose bytes are not known: no text has the length of a sum with it


def _byte_lengths(backend: Any) -> np.ndarray | None:
    """Bytes of text [V] of every token; None if the tokens are not the bytes of the text.

    What the parts of the tokenizer do not show, such as text that the pre-tokenizer removes, gives lengths whose sum is
    not the text's.
    """
    model, normalizer = backend.model, backend.normalizer
    if not isinstance(model, models.BPE) or model.byte_fallback or model.end_of_word_suffix:
        return None
    if model.continuing_subword_prefix or not isinstance(normalizer, normalizers.NFC | None):
        return None
    splits = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    splits = splits["pretokenizers"][-1] if splits.get("type") == "Sequence" else splits
    added = backend.get_added_tokens_decoder()
    if splits.get("type") != "ByteLevel" or splits["add_prefix_space"]:
        return None
    if any(token.lstrip or token.rstrip for token in added.values()):  # they take white space around them
        return None
    alphabet = frozenset(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = backend.get_vocab(with_added_tokens=False)
    lengths = np.full(max([*vocabulary.values(), *added], default=-1) + 1, _NO_BYTES, np.int64)
    for token, number in vocabulary.items():
        if alphabet.issuperset(token):
            lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = len(token.content.encode())
    # Bytes that the vocabulary lacks become the unknown token, one or several together, or are removed without one.
    if model.unk_token is not None and not alphabet <= vocabulary.keys():
        lengths[backend.token_to_id(model.unk_token)] = _NO_BYTES
    return lengths


def runs_of_weight(weights: np.ndarray) -> Iterator[tuple[slice, float]]:
    """The runs of tokens of equal weight, in their order: their places in `weights` [n], and the weight of each."""
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    for start, end in pairwise(bounds):
        yield slice(start, end), float(weights[start])


def token_weights(located: LocatedTokens, spans: Sequence[tuple[int, int, float]], outside: float) -> np.ndarray:
    """Weights [n] float32 of tokens; spans (start, end, weight) count the characters of the text.

    A token has the weight of the span that holds its first character, else `outside`. One that begins before a span
    and holds words of it (" Paris" where the prompt ends with a space) has the span's weight, so that no word is lost.
    One that holds only white space of it has not: the prompt ends with a separate token there.
    """
    text, starts, ends = located.text, located.starts, located.ends
    weights = np.zeros(len(starts), np.float32)
    if outside:
        weights[:] = outside
    for *span, weight in spans:
        start, end = span if isinstance(text, str) else located.places(span)
        first = before = bisect_left(starts, start)
        while first < len(starts) and ends[first] <= start:  # of no characters
            first += 1
        weights[first : max(bisect_left(starts, end), first)] = weight
        while before and ends[before - 1] > start:
            before -= 1
            part = text[start : ends[before]]
            if (part.decode(errors="replace") if isinstance(part, bytes) else part).strip():
                weights[before] = weight
    return weights


def locate_plain(tokenizer: PreTrainedTokenizerFast, locate: TokenLocator, text: str) -> LocatedTokens:
    """The tokens of plain text, with the special tokens that the tokenizer adds. A beginning-of-sequence token that the
    text itself begins with is not added once more."""
    ids, starts, ends, text_or_bytes = locate(text, add_special_tokens=True)
    doubled = int(ids[:2].tolist() == [tokenizer.bos_token_id] * 2 and text.startswith(str(tokenizer.bos_token)))
    return LocatedTokens(ids[doubled:], starts[doubled:], ends[doubled:], text_or_bytes)
