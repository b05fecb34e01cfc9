"""Comparison of two forward passes: statistics by position, pairs of modules, and the first pair that differs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from converters.weight_rows import Tensor

RANGES = (0, 16, 64, 256)
"""Starts of the ranges of positions: errors in rope and windows appear late, or grow."""


@dataclass(frozen=True)
class RangeStatistics:
    """How the logits over a range of positions differ."""

    start: int
    stop: int
    difference: float  # maximum of |ours - theirs|
    kl: float  # mean KL(theirs || ours), nats
    median_kl: float
    top1: float  # share of tokens where the most probable token is the same


def compare_logits(ours: np.ndarray, theirs: np.ndarray) -> list[RangeStatistics]:
    """Compare logits [B, T, V]: over all positions, then by range."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    length = ours.shape[1]
    # One position at a time: in double precision, all positions would take several times the memory of the logits.
    statistics = np.asarray([_compare_position(ours[:, t], theirs[:, t]) for t in range(length)])
    starts = [start for start in RANGES if start < length]
    ranges = []
    for start, stop in [(0, length), *zip(starts, [*starts[1:], length], strict=True)]:
        differences, kls, same = statistics[start:stop].T
        ranges.append(
            RangeStatistics(
                start,
                stop,
                difference=float(differences.max()),
                kl=float(kls.mean()),
                median_kl=float(np.median(kls)),
                top1=float(same.mean()),
            )
        )
    return ranges


def _compare_position(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    kl = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(-1).mean()
    return np.abs(ours - theirs).max(), kl, (ours.argmax(-1) == theirs.argmax(-1)).mean()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Pair(NamedTuple):
    hf: str
    shared: bool = False  # theirs corresponds to several of ours (a fused q, k and v)


def pair_modules(tensors: Sequence[Tensor], owners: Mapping[str, str]) -> dict[str, Pair]:
    """The paths of our modules with those of theirs, from the weight rows: modules with the same weights correspond.

    A module without weights is paired with the innermost module of theirs that contains all the weights below it.
    `owners` maps each of the checkpoint's tensors to the parameter of transformers' model that holds it.
    """
    holders: dict[str, set[str]] = {}
    for tensor in tensors:
        if not tensor.alias and tensor.name in owners:
            holders.setdefault(module_path(tensor), set()).add(_parent(owners[tensor.name]))
    users = [hf for theirs in holders.values() for hf in theirs]
    pairs = {
        ours: Pair(hf, users.count(hf) > 1) for ours, theirs in holders.items() for hf in theirs if len(theirs) == 1
    }
    above = {path for ours in holders for path in itertools.accumulate(ours.split("."), "{}.{}".format)}
    for path in above - holders.keys():
        below = [hf.split(".") for ours in holders if ours.startswith(f"{path}.") for hf in holders[ours]]
        # A common beginning is at most as long as the shortest path, so the rest of the others is not read.
        common = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*below, strict=False))
        pairs[path] = Pair(".".join(names[0] for names in common))
    return pairs


def module_path(tensor: Tensor) -> str:
    """The path of the tensor's module: `layers.3.attn.q_proj` for layer 3 of `layers.attn.q_proj.kernel`."""
    top, *inner = _parent(tensor.ours).split(".")
    return ".".join([top, *(str(tensor.layers[place]) for place in tensor.stack[:1]), *inner])


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _name(path: str) -> str:
    return path.rpartition(".")[2]


@dataclass(frozen=True)
class Point:
    """One comparison: the input or output of a module of ours, against that of its pair."""

    path: str
    hf: str
    side: str  # in, out
    error: float  # maximum over tokens of |ours - theirs| / |theirs|: norms over the channels of the token
    position: int  # the first with an error above the tolerance; -1 if there is none


def compare_values(ours: np.ndarray, theirs: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """The relative error of each token, [B, T] (`shape`); None if the two differ in the number of values per token.

    Trailing axes may be split differently, and theirs may have the axis of heads before that of tokens.
    """
    if theirs.ndim == 4 and theirs.shape[2] == shape[1] != theirs.shape[1]:
        theirs = theirs.swapaxes(1, 2)
    if ours.size != theirs.size or ours.shape[:2] != shape:
        return None
    ours, theirs = (np.asarray(each, np.float64).reshape(*shape, -1) for each in (ours, theirs))
    norms = np.linalg.norm(theirs, axis=-1)
    floor = 0.01 * np.sqrt((norms**2).mean())  # near-zero tokens would show rounding only
    return np.linalg.norm(ours - theirs, axis=-1) / np.maximum(norms, max(floor, 1e-30))


@dataclass(frozen=True)
class Mismatch:
    """The first place where the two models differ."""

    where: str  # ours: layers.3.attn
    hf: str  # theirs: model.layers.3.self_attn
    what: str  # the part of the module; empty for the module itself
    suspects: str
    error: float
    position: int  # the first that differs

    def __str__(self) -> str:
        place = f"{self.where}{f' ({self.what})' if self.what else ''}, in transformers {self.hf}"
        suspects = f": {self.suspects}" if self.suspects else ""
        return f"{place}{suspects}; relative error {self.error:.1e}, from position {self.position} on"


SUSPECTS = {
    "o_proj": "rope, mask, window, scale, softcap or sinks",
    "down_proj": "the activation, or gate and up swapped",
    "norm": "scale, offset or epsilon",
    "proj": "kernel or bias: the ops of its row, or the values of another tensor",
    "embed": "the table, or a scale on the embeddings",
    "head": "its kernel, or a softcap or a factor on the logits",
}
_SUM = "a sum with the residual stream, a norm or a factor"


def first_mismatch(points: Sequence[Point]) -> Mismatch | None:
    """The location of the first point that differs; `points` are in the order in which ours were computed.

    If the output of a module differs, the error is in the module itself, or in what follows its last sub-module. If its
    input differs, the error is in its parent, between the modules that agree and this one.
    """
    first = next((number for number, point in enumerate(points) if point.position >= 0), None)
    if first is None:
        return None
    point, before = points[first], points[:first]
    if point.side == "out":
        inner = _outputs(before, point.path)
        what = f"after {', '.join(inner)}" if inner else ""
        suspects = _SUM if inner else _suspects(_name(point.path))
        return Mismatch(point.path, point.hf, what, suspects, point.error, point.position)
    above = next((each for each in before if each.path == _parent(point.path)), None)
    siblings = _outputs(before, above.path if above else "")
    what = f"between {', '.join(siblings) or 'its input'} and {_name(point.path) if above else point.path}"
    suspects = SUSPECTS.get(_name(point.path), _SUM)
    where, hf = (above.path, above.hf) if above else ("the model", "the model")
    return Mismatch(where, hf, what, suspects, point.error, point.position)


def _outputs(points: Sequence[Point], parent: str) -> list[str]:
    """The sub-modules of `parent` with an output, in order."""
    return [_name(point.path) for point in points if point.side == "out" and _parent(point.path) == parent]


def _suspects(name: str) -> str:
    return next((words for ending, words in SUSPECTS.items() if name.rpartition("_")[2] == ending), "")
