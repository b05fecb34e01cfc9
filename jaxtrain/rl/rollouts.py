"""The types of a rollout, and the conversion of trajectories to packed rows and back.

A `Sampler` completes a `Prompt` several times, which gives a group of `Trajectory`s; rewards and advantages are added
later. Everything here is numpy, on the host. As in `Batch`, a per-token value at `t` belongs to the token at `t`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.data.packing import BestFit, make_row, signal_types, stack_rows
from jaxtrain.types import Batch, Example, Params

NO_ID = -1  # fills a token's support up to the width of the widest
LOST_REWARD = "lost_reward"  # the key of `Trajectory.info` that says why a sample has no reward
SUPPORTS = "supports"  # the signal of that name: [B, T, k] ids that could have been drawn, NO_ID where there are fewer


class Prompt(NamedTuple):
    """A row of the prompt data, rendered and tokenised."""

    number: int  # in the order drawn, from 0, over all epochs: together with a sample's index it seeds that sample
    ids: np.ndarray  # [P] int32
    columns: Mapping[str, Any]  # the row, its prompt included: what rewards and environments receive


class Trajectory(NamedTuple):
    """One sample of a prompt. C is the number of completion tokens: the model's and, in between, the environment's."""

    prompt: Prompt
    sample: int  # its index among the samples of the prompt
    completion_ids: np.ndarray  # [C] int32, the stop token that ended it included; never tokenised again
    loss_mask: np.ndarray  # [C] bool: the model sampled the token (it is not the environment's)
    sampler_logps: np.ndarray  # [C] float32, under the distribution drawn from: temperature and filters applied
    raw_logps: np.ndarray  # [C] float32, under the model's plain softmax
    versions: np.ndarray  # [C] int32, optimizer steps of the weights that sampled the token
    text: str  # of the completion, without special tokens
    finish_reason: str  # "stop"; "length" where it was cut off; "turns" or "error" of a conversation
    supports: np.ndarray | None = None  # [C, k] int32, ids kept by top-k, top-p, min-p; None: the full vocabulary
    rewards: Mapping[str, float] = {}  # by part, unweighted; NaN where a part does not apply or failed
    reward: float = float("nan")  # weighted sum of the parts; NaN before scoring, and where it is lost
    token_rewards: np.ndarray | None = None  # [C] float32, an environment's rewards at the turns' last tokens
    advantages: np.ndarray | None = None  # [C] float32
    timings: Mapping[str, float] = {}  # seconds by part, e.g. rollout, reward
    info: Mapping[str, Any] = {}  # from the environment or the rewards: turns, tool calls, errors

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt.ids) + len(self.completion_ids)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Sampler(Protocol):
    """Completes prompts: an engine in this process, on other devices or in other processes."""

    def sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[Trajectory]]:
        """`samples` unscored trajectories of each prompt, in order. The same call gives the same result."""
        ...

    def set_params(self, params: Params, version: int) -> None:
        """Use these weights from now on; `version` is the number of optimizer steps they have taken."""
        ...


class Scorer(Protocol):
    """Fills in `rewards` and `reward` (and their timings), in order. A reward that fails affects its sample only."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]: ...


class Span(NamedTuple):
    """The position of a trajectory's completion in the packed rows."""

    row: int
    start: int
    stop: int


class Packed(NamedTuple):
    """Trajectories as rows: prompts and completions side by side, loss on the model's own tokens."""

    batch: Batch  # [B, T]
    spans: tuple[Span, ...]  # of the completions, in the order of the trajectories

    def spread(self, **values: Sequence[np.ndarray]) -> Packed:
        """Add signals: one array [C] or [C, k] a trajectory becomes [B, T] or [B, T, k], 0 outside the completions."""
        signals = dict(self.batch.signals)
        for name, pieces in values.items():
            spread = np.zeros((*self.batch.tokens.shape, *pieces[0].shape[1:]), pieces[0].dtype)
            for (row, start, stop), piece in zip(self.spans, pieces, strict=True):
                spread[row, start:stop] = piece
            signals[name] = spread
        return self._replace(batch=self.batch._replace(signals=signals))

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """The inverse: [B, T, ...] -> the completion's part [C, ...] of each trajectory."""
        return [values[row, start:stop] for row, start, stop in self.spans]


def pack(trajectories: Sequence[Trajectory], max_length: int, rows: int | None = None) -> Packed:
    """Trajectories best-fit into rows of `max_length` tokens, with rows of padding up to `rows` rows.

    Signals: `sampler_logps`, `versions`, and `supports` where a sample has one. The sampler knows the limit, so a
    trajectory is never longer than a row.
    """
    return _packed(trajectories, _layout(trajectories, max_length), max_length, rows)


def pack_parts(parts: Sequence[Sequence[Trajectory]], max_length: int, multiple: int) -> list[Packed]:
    """Each part of the trajectories packed by itself, all into the same number of rows, a multiple of `multiple`.

    Each number of rows is a program of its own to compile, so it is rounded up to one of four sizes per octave: at most
    a fifth of the rows is padding once there are many.
    """
    layouts = [_layout(part, max_length) for part in parts]
    pieces = -(-max(map(len, layouts)) // multiple)
    grain = max(1 << (pieces.bit_length() - 3), 1) if pieces > 4 else 1
    rows = -(-pieces // grain) * grain * multiple
    return [_packed(part, layout, max_length, rows) for part, layout in zip(parts, layouts, strict=True)]


def _layout(trajectories: Sequence[Trajectory], max_length: int) -> list[list[int]]:
    """The numbers of the trajectories in each row, by best-fit decreasing."""
    too_long = max((t.length for t in trajectories), default=0)
    assert too_long <= max_length, f"a trajectory of {too_long} tokens does not fit into a row of {max_length}"
    packer: BestFit[int] = BestFit(max_length, most_open=len(trajectories))
    layout: list[list[int]] = []
    # Longest first; ties in order, so that the same trajectories always give the same rows.
    for index in sorted(range(len(trajectories)), key=lambda i: -trajectories[i].length):
        full = packer.add(index, trajectories[index].length)
        layout += [full] if full else []
    while (row := packer.take()) is not None:
        layout.append(row)
    return layout


def _packed(
    trajectories: Sequence[Trajectory], layout: list[list[int]], max_length: int, rows: int | None = None
) -> Packed:
    assert rows is None or len(layout) <= rows, f"{len(layout)} rows of trajectories and room for {rows}"
    width = max((t.supports.shape[1] for t in trajectories if t.supports is not None), default=None)
    examples = [_example(t, width) for t in trajectories]
    spans: dict[int, Span] = {}
    for number, row in enumerate(layout):
        end = 0
        for index in row:
            start, end = end, end + trajectories[index].length
            spans[index] = Span(number, start + len(trajectories[index].prompt.ids), end)
    types = signal_types(examples[0]) if examples else {}
    padding = [[]] * ((rows or len(layout)) - len(layout))
    made = [make_row([examples[index] for index in row], max_length, types) for row in [*layout, *padding]]
    return Packed(stack_rows(made), tuple(spans[index] for index in range(len(trajectories))))


def support_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """`sampling/support_full`: the share of tokens whose support is full, so that the filters may have kept more."""
    own = [t.supports[t.loss_mask, -1] != NO_ID for t in trajectories if t.supports is not None]
    full = np.concatenate(own) if own else np.zeros(0)
    return {"sampling/support_full": float(full.mean())} if len(full) else {}


def _example(trajectory: Trajectory, width: int | None) -> Example:
    """Loss on the model's own tokens; signals are 0 on the prompt. `width` is that of the widest support, if any."""
    prompt = trajectory.prompt.ids
    signals = {"sampler_logps": trajectory.sampler_logps, "versions": trajectory.versions}
    if width is not None:
        signals[SUPPORTS] = _support(trajectory, width)

    def whole(values: np.ndarray) -> np.ndarray:
        return np.concatenate([np.zeros((len(prompt), *values.shape[1:]), values.dtype), values])

    return Example(
        np.concatenate([prompt, trajectory.completion_ids]).astype(np.int32),
        whole(trajectory.loss_mask.astype(np.float32)),
        {name: whole(values) for name, values in signals.items()},
    )


def _support(trajectory: Trajectory, width: int) -> np.ndarray:
    """[C, width]; rows of NO_ID, which stand for the full vocabulary, where a sample has no support."""
    support = np.full((len(trajectory.completion_ids), width), NO_ID, np.int32)
    if trajectory.supports is not None:
        support[:, : trajectory.supports.shape[1]] = trajectory.supports
    return support
