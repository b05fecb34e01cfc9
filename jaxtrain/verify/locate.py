"""Locates the first difference between our forward pass and that of transformers: by layer, then by sub-module."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.reference import ModuleCall, Reference
from converters.verify import Mismatch, Pair, Point, compare_values, first_mismatch, pair_modules
from jaxtrain.nn.config import ModelConfig
from jaxtrain.nn.rope import rope_table
from jaxtrain.types import Array
from jaxtrain.verify.subject import Subject, as_batch, params_as, precise

MODULE_TOLERANCE = 1e-3  # |ours - theirs| / |theirs|, norms over the channels of each token
_IN_A_LAYER = re.compile(r"layers\.\d+\.")
_ATTENTION = re.compile(r"layers\.(\d+)\.attn")


def locate(subject: Subject, reference: Reference, ids: np.ndarray, dtype: str) -> tuple[list[Point], Mismatch | None]:
    """Compare the inputs and outputs of every layer and find the first mismatch, in two passes of each model.

    The first pass records layers, the second the sub-modules of the first layer that differs, so that memory never
    holds the values of all sub-modules. `reference` must hold the model in `dtype`, which ours uses, too.
    """
    pairs = pair_modules(subject.tensors, reference.owners())
    outside = {path: pair for path, pair in pairs.items() if not _IN_A_LAYER.match(path)}
    layers, _ = _observe(subject, reference, ids, dtype, outside)
    mismatch = first_mismatch(layers)
    if mismatch is None or not re.fullmatch(r"layers\.\d+", mismatch.where):
        return layers, mismatch
    within = {path: pair for path, pair in pairs.items() if f"{path}.".startswith(f"{mismatch.where}.")}
    points, calls = _observe(subject, reference, ids, dtype, within)
    mismatch = first_mismatch(points) or mismatch
    attention = _ATTENTION.fullmatch(mismatch.where)
    if attention and mismatch.what and mismatch.hf in calls:
        suspects = _attention_suspects(subject.config, int(attention[1]), ids, calls[mismatch.hf].keywords)
        mismatch = replace(mismatch, suspects=suspects or mismatch.suspects)
    return layers, mismatch


def _observe(
    subject: Subject, reference: Reference, ids: np.ndarray, dtype: str, pairs: Mapping[str, Pair]
) -> tuple[list[Point], dict[str, ModuleCall]]:
    calls, logits = reference.record(ids, {pair.hf for pair in pairs.values()})
    points: list[Point] = []
    compared: dict[str, int] = {}  # by module of theirs that corresponds to several of ours: channels compared so far

    def on_value(path: str, side: str, value: Array) -> None:
        pair = pairs.get(path)
        if pair is None or pair.hf not in calls:
            return
        ours, theirs = np.asarray(value), calls[pair.hf].input if side == "in" else calls[pair.hf].output
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
        compare("lm_head", "lm_head", "out", np.asarray(model.logits(params, hidden)), logits)
    return points, calls


def _attention_suspects(config: ModelConfig, layer: int, ids: np.ndarray, theirs: Mapping[str, Any]) -> str:
    """Compare the rope table and the mask that transformers passed to its attention with ours."""
    length, window, rope = ids.shape[1], config.pattern[layer].window, config.pattern[layer].rope
    suspects = []
    if rope is not None and isinstance(theirs.get("position_embeddings"), tuple):
        table = rope_table(rope, config.head_dim, as_batch(ids).positions, jnp.asarray(length))
        ours = [np.asarray(half)[0, :, 0] for half in table]
        reference = [np.asarray(half[0], np.float64) for half in theirs["position_embeddings"]]
        if any(
            half.shape[-1] not in (own.shape[-1], 2 * own.shape[-1])
            or np.abs(half[:, : own.shape[-1]] - own).max() > 1e-3
            for own, half in zip(ours, reference, strict=True)
        ):
            suspects.append("rope (base, scaling, or the share of rotated channels): its cosines and sines differ")
    if theirs.get("attention_mask") is not None:
        # The number of tokens that the last one attends to.
        visible = int((np.asarray(theirs["attention_mask"])[0, 0, -1] == 0).sum())
        if visible != min(window or length, length):
            suspects.append(
                f"window: the last of {length} tokens attends to {visible}, ours to {min(window or length, length)}"
            )
    return "; ".join(suspects) or "rope's layout, scale, softcap or sinks, since rope tables and windows agree"
