"""Explains a mismatch: computes what could have been done instead, and names what reproduces either side.

The inputs of attention and of the experts agree when the mismatch lies after them. A short numpy implementation then
computes their outputs, with the config's values and with one change at a time. The variant that equals our values and
the one that equals those of transformers show what each of them does.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from jaxtrain.nn.config import Activation, ClampedSwiGLU, ModelConfig, MoE

SIDES = ("ours", "transformers")
SAME = 1e-3  # relative error of outputs that count as equal
_SETTINGS = "the settings of the config"


@dataclass(frozen=True)
class AttentionSetting:
    """How one layer attends."""

    window: int | None
    scale: float
    softcap: float | None
    sinks: np.ndarray | None = None  # [N]
    grouped: bool = True  # neighbouring query heads share a key/value head; else every K-th
    causal: bool = True
    rotation: str = "halves"  # channel pairs of rope: "halves", "neighbours", "backwards" or "none"


def explain_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: tuple[np.ndarray, np.ndarray] | None,
    setting: AttentionSetting,
    ours: np.ndarray,
    theirs: np.ndarray,
) -> str:
    """q [T, N, H], k and v [T, K, H] before rope, cosines and sines [T, R/2], outputs of both sides [T, N*H]."""

    def variants() -> Iterable[tuple[str, AttentionSetting]]:
        yield _SETTINGS, setting
        yield "key/value heads in another order (every K-th query head shares one)", replace(setting, grouped=False)
        for scale, words in (
            (q.shape[-1] ** -0.5, "1 / sqrt(head_dim)"),
            (1.0, "1"),
            (1 / q.shape[-1], "1 / head_dim"),
        ):
            yield f"scale {words}", replace(setting, scale=scale)
        yield "no softcap", replace(setting, softcap=None)
        yield "no sinks", replace(setting, sinks=None)
        yield "no window", replace(setting, window=None)
        for change in (-1, 1):
            if setting.window:
                yield f"a window of {setting.window + change}", replace(setting, window=setting.window + change)
        yield "no causal mask", replace(setting, causal=False)
        yield "rope", replace(setting, rotation="halves")
        yield "rope on pairs of neighbouring channels", replace(setting, rotation="neighbours")
        yield "rope in the other direction", replace(setting, rotation="backwards")
        yield "no rope", replace(setting, rotation="none")

    outputs = ((words, _attend(q, k, v, table, each).reshape(len(q), -1)) for words, each in variants())
    return _compare(outputs, ours, theirs)


def _compare(outputs: Iterable[tuple[str, np.ndarray]], ours: np.ndarray, theirs: np.ndarray) -> str:
    """What each side computes, or an empty text if neither side equals a variant."""
    found: dict[str, str] = {}
    for words, values in outputs:
        for side, expected in (("ours", ours), ("transformers", theirs)):
            if side not in found and _error(values, expected) < SAME:
                found[side] = words
        if len(found) == 2:
            break
    unknown = "none of the known variants: a scale, softcap, window or rope of another size"
    if not found:
        return ""
    return f"transformers computes with {found.get('transformers', unknown)}, ours with {found.get('ours', unknown)}"


def _error(values: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(values - expected) / max(np.linalg.norm(expected), 1e-30))


def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    table: tuple[np.ndarray, np.ndarray] | None,
    setting: AttentionSetting,
) -> np.ndarray:
    if table is not None:
        q, k = (_rotate(x, *table, setting.rotation) for x in (q, k))
    heads, kv_heads = q.shape[1], k.shape[1]
    shared = np.arange(heads) // (heads // kv_heads) if setting.grouped else np.arange(heads) % kv_heads
    scores = np.einsum("tnh,snh->nts", q, k[:, shared]) * setting.scale
    if setting.softcap:
        scores = setting.softcap * np.tanh(scores / setting.softcap)
    distance = np.subtract.outer(np.arange(len(q)), np.arange(len(q)))
    hidden = (distance < 0) if setting.causal else np.zeros_like(distance, bool)
    scores = np.where(hidden | (distance >= (setting.window or len(q))), -np.inf, scores)
    if setting.sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(setting.sinks[:, None, None], (heads, len(q), 1))], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., : len(q)]
    return np.einsum("nts,snh->tnh", weights, v[:, shared])


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotation: str) -> np.ndarray:
    if rotation == "none":
        return x
    width = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None] * (-1 if rotation == "backwards" else 1)
    pairs = x[..., :width]
    if rotation == "neighbours":
        first, second = pairs[..., ::2], pairs[..., 1::2]
        turned = np.stack([first * cos - second * sin, second * cos + first * sin], -1).reshape(pairs.shape)
    else:
        first, second = np.split(pairs, 2, -1)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return np.concatenate([turned, x[..., width:]], -1)


ACTIVATIONS: dict[Activation, str] = {
    "silu": "silu",
    "gelu_tanh": "tanh gelu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "squared relu",
}


def explain_gate(gate: np.ndarray, up: np.ndarray, activation: Activation, ours: np.ndarray, theirs: np.ndarray) -> str:
    """The operations between gate, up [T, F] and the input of the down projection [T, F]."""

    def variants() -> Iterable[tuple[str, np.ndarray]]:
        yield f"the activation {ACTIVATIONS[activation]}", _activate(gate, activation) * up
        for name, words in ACTIVATIONS.items():
            yield f"the activation {words}", _activate(gate, name) * up
            yield f"gate and up swapped ({words})", _activate(up, name) * gate

    return _compare(variants(), ours, theirs)


def _activate(x: np.ndarray, name: Activation) -> np.ndarray:
    if name == "relu":
        return np.maximum(x, 0)
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    from math import erf

    return x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


@dataclass(frozen=True)
class ExpertWeights:
    """Matrices [E, in, out] and biases [E, out] of one layer."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | float = 0.0
    up_bias: np.ndarray | float = 0.0
    down_bias: np.ndarray | float = 0.0


def explain_experts(
    x: np.ndarray, experts: ExpertWeights, config: ModelConfig, ours: np.ndarray, theirs: np.ndarray
) -> str:
    """What the experts and their weights do, for tokens x [T, D] and the outputs of both sides [T, D].

    An output is a sum of experts' outputs; solving for the weights of the sum shows which experts were used, how much.
    """
    assert config.moe is not None
    found: dict[str, tuple[str, np.ndarray]] = {}
    for words, settings in _expert_variants(config.moe, config.activation):
        outputs = _expert_outputs(x, experts, *settings)  # [T, E, D]
        for side, total in (("ours", ours), ("transformers", theirs)):
            weights = np.stack(
                [np.linalg.lstsq(each.T, y, rcond=None)[0] for each, y in zip(outputs, total, strict=True)]
            )
            if side not in found and _error(np.einsum("te,ted->td", weights, outputs), total) < SAME:
                found[side] = words, weights
        if len(found) == 2:
            break
    if len(found) < 2:
        sides = {side: found[side][0] if side in found else "none of the known variants" for side in SIDES}
        return (
            "the activation, the clamp or the matrices of the experts: transformers computes with "
            f"{sides['transformers']}, ours with {sides['ours']}"
        )
    (own, our_weights), (other, their_weights) = found["ours"], found["transformers"]
    if own != other:
        return f"transformers computes the experts with {other}, ours with {own}"
    return _explain_routing(our_weights, their_weights)


def _explain_routing(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Compare the weights [T, E] of experts that both sides used."""
    used = [np.abs(side) > 1e-3 * np.abs(side).max(-1, keepdims=True) for side in (ours, theirs)]
    if not (used[0].sum(-1) == used[1].sum(-1)).all():
        counts = [int(np.median(side.sum(-1))) for side in used]
        return f"the number of experts of a token: {counts[1]} in transformers, {counts[0]} in ours"
    if not (used[0] == used[1]).all():
        if np.allclose(np.sort(ours, -1), np.sort(theirs, -1), atol=1e-3 * np.abs(theirs).max()):
            return "the order of the experts: transformers gives the same weights to other experts"
        return "the choice of the experts by the router"
    sums = [side.sum(-1) for side in (ours, theirs)]
    if np.allclose(ours / sums[0][:, None], theirs / sums[1][:, None], atol=1e-3):
        return (
            f"the renormalisation of the experts' weights: they sum to {np.median(sums[1]):.3g} in transformers, to "
            f"{np.median(sums[0]):.3g} in ours"
        )
    return "the weights of the chosen experts (softmax, sigmoid, or a bias of the router)"


def _expert_variants(
    moe: MoE, activation: Activation
) -> Iterable[tuple[str, tuple[ClampedSwiGLU | None, Activation, bool]]]:
    clamp = moe.swiglu
    clamps = [(clamp, "the clamp of the config" if clamp else "no clamp")]
    clamps += [(replace(clamp, limit=np.inf), "no clamp")] if clamp else []
    for (each, words), swapped in itertools.product(clamps, (False, True)):
        yield f"{words}{', gate and up swapped' * swapped}", (each, activation, swapped)
    for name, words in ACTIVATIONS.items():
        yield f"the activation {words}", (None, name, False)


def _expert_outputs(
    x: np.ndarray, experts: ExpertWeights, clamp: ClampedSwiGLU | None, activation: Activation, swapped: bool
) -> np.ndarray:
    gate = np.einsum("td,edf->tef", x, experts.gate) + experts.gate_bias
    up = np.einsum("td,edf->tef", x, experts.up) + experts.up_bias
    gate, up = (up, gate) if swapped else (gate, up)
    if clamp is None:
        hidden = _activate(gate, activation) * up
    else:
        gate, up = np.minimum(gate, clamp.limit), np.clip(up, -clamp.limit, clamp.limit)
        hidden = (up + 1) * gate / (1 + np.exp(-clamp.alpha * gate))
    return np.einsum("tef,efd->ted", hidden, experts.down) + experts.down_bias
