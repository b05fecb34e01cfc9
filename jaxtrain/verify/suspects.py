"""Names the cause of a mismatch, from the values that both models computed around it."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.reference import ModuleCall
from converters.safetensors_io import Checkpoint, open_checkpoint
from converters.verify import Mismatch, Pair, Point, module_path
from converters.weight_rows import by_name, flatten, fuse
from jaxtrain.nn.rope import rope_table
from jaxtrain.verify.explain import AttentionSetting, ExpertWeights, explain_attention, explain_experts, explain_gate
from jaxtrain.verify.subject import Subject, as_batch

_LAYER = re.compile(r"layers\.(\d+)\.(attn|mlp)")
_TOKENS = 16  # tokens whose experts are explained


@dataclass(frozen=True)
class Observed:
    """The values of both models around modules: ours by path and side, theirs by the name of the module."""

    points: list[Point]
    ours: Mapping[tuple[str, str], np.ndarray]
    theirs: Mapping[str, ModuleCall]


def explain(
    subject: Subject, mismatch: Mismatch, seen: Observed, pairs: Mapping[str, Pair], ids: np.ndarray
) -> Mismatch:
    """The mismatch with what caused it as its suspects, where that is found."""
    inside = _LAYER.fullmatch(mismatch.where)
    words = ""
    if inside and mismatch.hf in seen.theirs:
        layer, kind = int(inside[1]), inside[2]
        if kind == "attn" and mismatch.what:
            words = _in_tables(subject, layer, ids, seen.theirs[mismatch.hf].keywords) or _in_attention(
                subject, layer, seen, pairs
            )
        elif kind == "mlp" and subject.config.moe:
            words = _in_experts(subject, layer, seen, mismatch)
        elif kind == "mlp":
            words = _in_gate(subject, layer, seen, pairs)
    elif not mismatch.what:
        words = _in_values(subject, mismatch.where, seen)
    return replace(mismatch, suspects=words) if words else mismatch


def order_of_layers(pairs: Mapping[str, Pair], calls: Sequence[str]) -> Mismatch | None:
    """A mismatch if the layers of transformers that the weight rows pair with ours run in another order."""
    layers = [f"layers.{number}" for number in range(sum(bool(re.fullmatch(r"layers\.\d+", path)) for path in pairs))]
    theirs = [pairs[layer].hf for layer in layers]
    run = [name for name in calls if name in theirs]
    for number, (ours, name) in enumerate(zip(layers, theirs, strict=True)):
        if name in run and run.index(name) != number:
            words = f"the order of the layers: transformers runs {name} as number {run.index(name)}"
            return Mismatch(ours, name, "", words, np.inf, 0)
    return None


def _in_tables(subject: Subject, layer: int, ids: np.ndarray, theirs: Mapping[str, Any]) -> str:
    """Compare the rope table and the mask that transformers passed to its attention with ours."""
    kind, length = subject.config.pattern[layer], ids.shape[1]
    suspects = []
    if kind.rope is not None and isinstance(theirs.get("position_embeddings"), tuple):
        ours = _table(subject, layer, ids)
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
        own = min(kind.window or length, length)
        if visible != own:
            suspects.append(f"window: the last of {length} tokens attends to {visible}, ours to {own}")
    return "; ".join(suspects)


def _table(subject: Subject, layer: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kind = subject.config.pattern[layer]
    assert kind.rope is not None
    width, positions = subject.config.rope_dim(kind), as_batch(ids).positions
    table = rope_table(kind.rope, width, positions, jnp.asarray(ids.shape[1]))
    return np.asarray(table.cos)[0, :, 0], np.asarray(table.sin)[0, :, 0]


def _in_attention(subject: Subject, layer: int, seen: Observed, pairs: Mapping[str, Pair]) -> str:
    config, at = subject.config, f"layers.{layer}.attn"
    q, k = (
        seen.ours.get((f"{at}.{name}_norm", "out"), seen.ours.get((f"{at}.{name}_proj", "out"))) for name in ("q", "k")
    )
    v, ours = seen.ours.get((f"{at}.v_proj", "out")), seen.ours.get((f"{at}.o_proj", "in"))
    theirs = seen.theirs[pairs[f"{at}.o_proj"].hf].input
    if q is None or k is None or v is None or ours is None or theirs is None or config.attention_gate:
        return ""
    kind = config.pattern[layer]
    setting = AttentionSetting(
        window=kind.window,
        scale=config.attention_scale or config.heads_of(kind)[1] ** -0.5,
        softcap=config.attention_softcap,
        sinks=np.asarray(
            flatten(subject.params)["layers.attn.sinks"][config.layers_of("attn").index(layer)], np.float64
        )
        if config.sinks
        else None,
        rotation="halves" if kind.rope else "none",
    )
    table, given = None, seen.theirs[pairs[at].hf].keywords.get("position_embeddings")
    if kind.rope:
        table = _table(subject, layer, np.zeros((1, q.shape[1]), np.int32))
    elif isinstance(given, tuple):
        cos, sin = (np.asarray(half[0], np.float64)[:, : config.heads_of(kind)[1] // 2] for half in given)
        table = cos, sin
    q, k, v, ours, theirs = (np.asarray(each[0], np.float64) for each in (q, k, v, ours, theirs))
    ours, theirs = (each.reshape(len(each), -1) for each in (ours, theirs))
    return explain_attention(q, k, v, table, setting, ours, theirs)


def _in_gate(subject: Subject, layer: int, seen: Observed, pairs: Mapping[str, Pair]) -> str:
    at = f"layers.{layer}.mlp"
    names = [(f"{at}.gate_proj", "out"), (f"{at}.up_proj", "out"), (f"{at}.down_proj", "in")]
    down = seen.theirs.get(pairs[f"{at}.down_proj"].hf)
    if down is None or down.input is None or not all(name in seen.ours for name in names):
        return ""
    gate, up, ours = (np.asarray(seen.ours[name][0], np.float64) for name in names)
    return explain_gate(
        gate, up, subject.config.activation, ours, np.asarray(down.input, np.float64).reshape(ours.shape)
    )


def _in_experts(subject: Subject, layer: int, seen: Observed, mismatch: Mismatch) -> str:
    call, ours = seen.theirs[mismatch.hf], seen.ours.get((mismatch.where, "out"))
    shared = subject.config.moe is not None and subject.config.moe.shared_size > 0
    if call.input is None or call.output is None or ours is None or shared:
        return ""  # a shared expert's output is in the sum that the experts' weights are solved from
    width = subject.config.hidden_size
    first = max(min(mismatch.position, ours.shape[1] - _TOKENS), 0)
    x, ours, theirs = (
        np.asarray(each, np.float64).reshape(*ours.shape[:2], width)[0, first : first + _TOKENS]
        for each in (call.input, ours, call.output)
    )
    leaves, arrays = flatten(subject.params), dict[str, np.ndarray]()
    for name, (part, ending) in itertools.product(("gate", "up", "down"), (("kernel", ""), ("bias", "_bias"))):
        leaf = leaves.get(f"layers.mlp.experts.{name}_proj.{part}")
        if leaf is not None:
            arrays[name + ending] = np.asarray(leaf[subject.config.layers_of("mlp").index(layer)], np.float64)
    return explain_experts(x, ExpertWeights(**arrays), subject.config, ours, theirs)


def _in_values(subject: Subject, where: str, seen: Observed) -> str:
    """Why a module with weights has another output: its values are those of another tensor, or in another order."""
    tensors = [tensor for tensor in subject.tensors if module_path(tensor) == where and not tensor.alias]
    leaves = flatten(subject.params)
    changed = ""
    with open_checkpoint(subject.folder) as checkpoint:
        for name, parts in by_name(tensors).items():
            if len(parts) < len(by_name(subject.tensors)[name]):
                continue  # a part of a fused tensor
            ours = fuse(parts, lambda part: np.asarray(leaves[part.ours][part.stack])).astype(checkpoint.dtype(name))
            if checkpoint.read(name).tobytes() != ours.tobytes():
                changed = f"the values of {name} were changed after they were read"
                if other := _holder(checkpoint, name, ours.tobytes()):
                    return f"the values of {other} in place of those of {name}"
    names = {tensor.name.rpartition(".")[0] for tensor in tensors}
    ours = seen.ours.get((where, "out"))
    outputs = [seen.theirs[name].output for name in names if name in seen.theirs]
    if ours is not None and len(outputs) == 1 and outputs[0] is not None and outputs[0].size == ours.size:
        return _other_order(ours[0], outputs[0].reshape(ours.shape)[0]) or changed
    return changed


def _holder(checkpoint: Checkpoint, name: str, values: bytes) -> str | None:
    """Another tensor of the folder with these values, of the shape of tensor `name`."""
    shape = checkpoint.entries[name].shape
    same = (other for other, entry in checkpoint.entries.items() if entry.shape == shape)
    return next((other for other in same if checkpoint.read(other).tobytes() == values), None)


def _other_order(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Outputs [T, ...] that are a permutation of each other, by heads [T, N, H] or by channels [T, D]."""
    axes = "heads" if ours.ndim == 3 else "channels"
    scale = np.abs(theirs).max()
    order = []
    for place in range(ours.shape[1]):
        errors = np.abs(theirs - ours[:, place : place + 1]).reshape(*theirs.shape[:2], -1).max((0, 2))
        if errors.min() > 1e-3 * scale:
            return ""
        order.append(int(errors.argmin()))
    if order == list(range(len(order))) or len(set(order)) < len(order):
        return ""
    return f"{axes} in another order: ours 0, 1, ... are {', '.join(map(str, order[:8]))} of transformers"
