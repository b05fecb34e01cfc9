"""Locates the first difference between our forward pass and that of transformers: by layer, then by sub-module."""

import re
from collections.abc import Mapping

import numpy as np

from converters.reference import ModuleCall, Reference
from converters.verify import Mismatch, Pair, Point, compare_values, first_mismatch, module_path, pair_modules
from converters.weight_rows import PairsToHalves
from jaxtrain.types import Array
from jaxtrain.verify.subject import Subject, as_batch, outputs, params_as, precise
from jaxtrain.verify.suspects import Observed, explain, order_of_layers

MODULE_TOLERANCE = 1e-3  # |ours - theirs| / |theirs|, norms over the channels of each token
_IN_A_LAYER = re.compile(r"layers\.\d+\.")


def locate(subject: Subject, reference: Reference, ids: np.ndarray, dtype: str) -> tuple[list[Point], Mismatch | None]:
    """Compare the inputs and outputs of every layer and find the first mismatch, in two passes of each model.

    The first pass records layers, the second the sub-modules of the first layer that differs, so that memory never
    holds the values of all sub-modules. `reference` must hold the model in `dtype`, which ours uses, too.
    """
    pairs = pair_modules(subject.tensors, reference.owners())
    outside = {path: pair for path, pair in pairs.items() if not _IN_A_LAYER.match(path)}
    seen = _observe(subject, reference, ids, dtype, outside)
    layers = seen.points
    mismatch = first_mismatch(_without_embedding(layers))
    if mismatch is None:
        return layers, None
    if swapped := order_of_layers(pairs, list(reference.record(ids[:, :1], _layers(pairs))[0])):
        return layers, swapped
    if re.fullmatch(r"layers\.\d+", mismatch.where):
        within = {path: pair for path, pair in pairs.items() if f"{path}.".startswith(f"{mismatch.where}.")}
        seen = _observe(subject, reference, ids, dtype, within)
        mismatch = first_mismatch(seen.points) or mismatch
    return layers, explain(subject, mismatch, seen, pairs, ids)


def _without_embedding(points: list[Point]) -> list[Point]:
    """Without the output of the embedding if the input of the first layer agrees: some models of transformers scale
    embeddings outside of their module."""
    agrees = any((point.path, point.side) == ("layers.0", "in") and point.position < 0 for point in points)
    return [point for point in points if not (agrees and point.path == "embed")]


def _layers(pairs: Mapping[str, Pair]) -> set[str]:
    return {pair.hf for path, pair in pairs.items() if re.fullmatch(r"layers\.\d+", path)}


def _in_our_order(
    subject: Subject, pairs: Mapping[str, Pair], calls: Mapping[str, ModuleCall]
) -> dict[str, ModuleCall]:
    """The calls of the modules whose output channels the weight rows reorder, with outputs in our order."""
    found = {}
    for tensor in subject.tensors:
        pair = pairs.get(module_path(tensor))
        if pair is None or not any(isinstance(op, PairsToHalves) for op in tensor.ops):
            continue
        call = calls.get(pair.hf)
        if call is None or call.output is None:
            continue
        channels = np.arange(tensor.shape[0], dtype=np.int32)
        if len(tensor.shape) == 2:  # a matrix [out, in]: in ours [in, N, H], every row has the same order
            channels = np.broadcast_to(channels[:, None], tensor.shape)
        order = tensor.to_ours_in_full(channels).reshape(-1, tensor.shape[0])[0]
        found[pair.hf] = call._replace(output=call.output[..., order])
    return found


def _observe(
    subject: Subject, reference: Reference, ids: np.ndarray, dtype: str, pairs: Mapping[str, Pair]
) -> Observed:
    calls, logits = reference.record(ids, {pair.hf for pair in pairs.values()})
    calls |= _in_our_order(subject, pairs, calls)
    points: list[Point] = []
    values: dict[tuple[str, str], np.ndarray] = {}
    compared: dict[str, int] = {}  # by module of theirs that corresponds to several of ours: channels compared so far

    def on_value(path: str, side: str, value: Array) -> None:
        pair = pairs.get(path)
        if pair is None or not hasattr(value, "shape"):  # experts get rows sorted by expert and their numbers
            return
        ours = values[path, side] = np.asarray(value)
        if pair.hf not in calls:
            return
        theirs = calls[pair.hf].input if side == "in" else calls[pair.hf].output
        if theirs is None:
            return
        if pair.shared and side == "out":
            width = ours[0, 0].size
            start = compared.get(pair.hf, 0)
            compared[pair.hf] = start + width
            theirs = theirs[..., start : start + width]
        compare(path, pair.hf, side, ours, theirs)

    def compare(path: str, hf: str, side: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        errors = compare_values(ours, theirs, (ids.shape[0], ids.shape[1]))
        if errors is not None:
            wrong = np.flatnonzero((errors > MODULE_TOLERANCE).any(0))
            position = int(wrong[0]) if wrong.size else -1
            points.append(Point(path, hf, side, float(errors.max()), position))

    with precise(dtype):
        model, params = subject.model(dtype), params_as(subject, dtype)
        hidden = model.watch(params, as_batch(ids), on_value)
        head, theirs = ("value_head", "score") if subject.scalar else ("lm_head", "lm_head")
        compare(head, theirs, "out", np.asarray(outputs(model, params, hidden)), logits)
    return Observed(points, values, calls)
