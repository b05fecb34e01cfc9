"""A sample under way, on the host: what it asks of its slot, what it has so far, where its text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxtrain.sample.constraints import FORBIDDEN, IN_PROMPT
from jaxtrain.sample.filters import Knobs
from jaxtrain.sample.requests import BIAS_SLOTS, STOP_SLOTS, Alternatives, Completion, FinishReason, Request, Timings

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


@dataclass
class Sample:
    number: int  # of the request
    index: int  # among the request's samples
    request: Request
    seed: int
    submitted: float
    tokenizer: Any
    prompt: tuple[int, ...] = ()
    admitted: float = 0.0
    first: float | None = None
    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    told: int = 0  # characters of the text that went out in chunks

    @property
    def marked(self) -> bool:
        params = self.request.params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        return penalties != (1, 0, 0) or params.allowed_ids is not None

    def knobs(self) -> Knobs:
        """The values of one slot."""
        params = self.request.params
        biases = list(params.logit_bias.items())
        return Knobs(
            seed=self.seed,
            sample=self.index,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_ids=_filled(params.stop_ids, STOP_SLOTS, -1, np.int32),
            want_logps=params.logprobs,
            want_best=params.alternatives > 0,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias_ids=_filled([token for token, _ in biases], BIAS_SLOTS, -1, np.int32),
            bias=_filled([bias for _, bias in biases], BIAS_SLOTS, 0, np.float32),
            marked=self.marked,
        )

    def marks(self, vocab_size: int) -> np.ndarray:
        """The slot's row of marks, [V] uint16."""
        allowed = self.request.params.allowed_ids
        row = np.zeros(vocab_size, np.uint16)
        if allowed is not None:
            row[:] = FORBIDDEN
            row[np.asarray(allowed)] = 0
        row[list(self.prompt)] |= IN_PROMPT
        return row

    def alternatives(self, ids: np.ndarray, logps: np.ndarray) -> Alternatives | None:
        """As many of those of each token, [m, a], as were asked for."""
        most = self.request.params.alternatives
        return Alternatives(ids[:, :most], logps[:, :most]) if most else None

    def add(self, values: tuple[np.ndarray, ...], version: int, now: float) -> int | None:
        """Take what a call made: ids, logps, raw logps, supports and alternatives, [m] or [m, c].

        Returns how many tokens there are up to the end of a stop string, if one is there.
        """
        self.first = self.first or now
        self.parts.append((*values, np.full(len(values[0]), version, np.int32)))
        before = len(self.ids)
        self.ids += values[0].tolist()
        if not self.request.params.stop or self._stop_at(self._decode(self.ids)) is None:
            return None
        # One token may bring several characters, but never takes any back: the first that completes a stop string.
        return next(
            n for n in range(before, len(self.ids) + 1) if self._stop_at(self._decode(self.ids[:n])) is not None
        )

    def new_text(self, last: bool, ended_by_token: bool = False) -> str | None:
        """What is sure of the text since the last call; all of it if this is the `last`."""
        if self.tokenizer is None:
            return None
        text = self._text(ended_by_token)
        sure = len(text) if last else _sure(text, self.request.params.stop)
        new = text[self.told : sure]
        self.told = max(self.told, sure)
        return new

    def finish(self, reason: FinishReason, count: int, ended_by_token: bool, now: float) -> Completion:
        """The sample of its first `count` tokens."""
        self.ids = self.ids[:count]
        ids, logps, raw_logps, supports, best, best_logps, versions = (
            np.concatenate(part)[:count] for part in zip(*self.parts, strict=True)
        )
        return Completion(
            ids=ids,
            text=None if self.tokenizer is None else self._text(ended_by_token),
            logps=logps,
            raw_logps=raw_logps,
            finish_reason=reason,
            versions=versions,
            supports=supports if self.request.filtered and supports.shape[1] else None,
            timings=Timings(self.admitted - self.submitted, (self.first or now) - self.submitted, now - self.submitted),
            error=f"the logits after {len(self.prompt)} prompt and {len(ids)} new tokens are not finite"
            if reason == "failed"
            else None,
            alternatives=self.alternatives(best, best_logps),
        )

    def _text(self, ended_by_token: bool) -> str:
        text = self._decode(self.ids[:-1] if ended_by_token else self.ids)
        return text[: self._stop_at(text)]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _stop_at(self, text: str) -> int | None:
        return min((text.find(stop) for stop in self.request.params.stop if stop in text), default=None)


def _sure(text: str, stops: Sequence[str]) -> int:
    """Characters that no later token changes: without one cut short, and without what may become a stop string."""
    sure = len(text.rstrip(_INCOMPLETE))
    for stop in stops:
        for size in range(min(len(stop) - 1, sure), 0, -1):
            if text[:sure].endswith(stop[:size]):
                sure -= size
                break
    return sure


def _filled(values: Sequence[Any], size: int, fill: int, kind: Any) -> np.ndarray:
    return np.pad(np.asarray(values, kind), (0, size - len(values)), constant_values=fill)
