"""Checks of single modules on inputs made for them: errors that no natural input shows in the logits.

An epsilon matters where activations are small, the order of rounding only in 16 bits, and a rope that depends on the
length changes at one length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.reference import Reference
from converters.verify import module_path, pair_modules
from jaxtrain.nn.config import DynamicScaling, LongRopeScaling, ModelConfig, Rope
from jaxtrain.nn.norm import RMSNorm
from jaxtrain.nn.rope import rope_table, token_segment_lengths
from jaxtrain.verify.checks import Check
from jaxtrain.verify.subject import Subject, precise

NORM_TOLERANCE = 1e-5  # in float32, relative, norms over the channels of a token
ROUNDED_OTHERWISE = 0.02  # share of 16-bit outputs that may differ: those near the middle of two numbers
ROPE_TOLERANCE = 1e-3  # |ours - theirs| of cosines and sines
_TOKENS = 32  # random vectors for each norm
_POSITIONS = 512  # rope tables are compared up to here: another scaling changes all positions


def norm_check(subject: Subject, reference: Reference, dtype: str) -> Check:
    """Compare every norm with its pair, on vectors whose mean square is epsilon, 1, and 1/epsilon.

    In 16 bits the outputs must be bit-identical but for rare ties: a norm that computes in 16 bits, or that rounds
    before it multiplies by the scale where transformers rounds after, changes a third of them.
    """
    name, config = f"norms {dtype}", subject.config
    pairs = pair_modules(subject.tensors, reference.owners())
    shapes = {module_path(tensor): tensor.shapes[-1] for tensor in subject.tensors}
    norms = [(path, norm) for path, norm in _norms(subject, dtype) if path in pairs]
    vectors, worst = np.random.default_rng(0), 0.0
    for path, norm in norms:
        theirs = pairs[path].hf
        channels = int(np.prod(shapes[path]))
        for mean_square in (config.norm_eps, 1.0, 1 / config.norm_eps):
            x = vectors.normal(0, mean_square**0.5, (_TOKENS, channels)).astype(jnp.dtype(dtype)).astype(np.float32)
            ours, expected = _apply(norm, x, shapes[path], dtype), reference.apply(theirs, x)
            if dtype == "float32":
                error = _relative(ours, expected)
                if not error < NORM_TOLERANCE:
                    cause = "epsilon" if mean_square == config.norm_eps else "scale or offset"
                    place = f"{path}, in transformers {theirs}: {cause}; relative error {error:.1e} for"
                    return Check(name, False, f"{place} vectors of mean square {mean_square:.0e}")
            else:
                error = float((ours != expected).mean())
                if not error < ROUNDED_OTHERWISE:
                    cause = _why_rounded_otherwise(subject, dtype, path, x, shapes[path], expected)
                    return Check(
                        name, False, f"{path}, in transformers {theirs}: {cause}; {error:.0%} of outputs differ"
                    )
            worst = max(worst, error)
    kind = f"relative errors up to {worst:.1e}" if dtype == "float32" else f"up to {worst:.1%} of outputs differ"
    return Check(name, True, f"{len(norms)} norms, {kind}")


def _norms(subject: Subject, dtype: str) -> list[tuple[str, Any]]:
    """The norms with their paths, their parameters in `dtype` as those of transformers."""
    found = []
    for path, module in subject.model(dtype).modules(subject.params):
        if path.rpartition(".")[2].endswith("norm"):
            nnx.update(module, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(module)))
            found.append((path, module))
    return found


def _apply(norm: Any, x: np.ndarray, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    with precise(dtype):
        return np.asarray(norm(jnp.asarray(x, dtype).reshape(-1, *shape)), np.float32).reshape(x.shape)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())


def _why_rounded_otherwise(
    subject: Subject, dtype: str, path: str, x: np.ndarray, shape: tuple[int, ...], expected: np.ndarray
) -> str:
    norm = dict(_norms(subject, dtype))[path]
    if isinstance(norm, RMSNorm):
        norm.wide = not norm.wide
        if (_apply(norm, x, shape, dtype) != expected).mean() < ROUNDED_OTHERWISE:
            order = "after" if norm.wide else "before"
            return f"norm_in_float32, since transformers rounds to {dtype} {order} it multiplies by the scale"
    return f"computed in another precision than transformers' (float32), or rounded to {dtype} elsewhere"


def rope_check(subject: Subject, reference: Reference, tokens: int) -> Check | None:
    """Compare the rope tables of every layer for sequences of `tokens` tokens, and of the lengths about which a rope
    changes. None if the model has no rope, or transformers no module for it."""
    pattern = subject.config.pattern
    if not any(kind.rope for kind in pattern):
        return None
    lengths = sorted({tokens, *boundaries(subject.config)})
    for length in lengths:
        theirs = reference.rope_tables(length)
        if not theirs:
            return None
        ours: dict[tuple[Rope, int], list[np.ndarray]] = {}
        for layer, kind in enumerate(pattern):
            if kind.rope is None:
                continue
            known = kind.rope, subject.config.rope_dim(kind)
            if known not in ours:
                ours[known] = _our_table(*known, length)
            for own, half in zip(ours[known], theirs[layer], strict=True):
                half = half[:_POSITIONS, : own.shape[-1]]
                difference = np.abs(own - half).max() if own.shape == half.shape else np.inf
                if not difference < ROPE_TOLERANCE:
                    return Check("rope", False, _rope_fault(layer, kind.rope, length, difference))
    return Check("rope", True, f"tables agree for sequences of {', '.join(map(str, lengths))} tokens")


def boundaries(config: ModelConfig) -> list[int]:
    """The lengths about which ropes change: the last one of either side."""
    found = set[int]()
    for kind in config.pattern:
        match kind.rope and kind.rope.scaling:
            case LongRopeScaling(original_max_positions=length) | DynamicScaling(max_positions=length):
                found |= {length, length + 1}
    return sorted(found)


def _our_table(rope: Rope, head_dim: int, length: int) -> list[np.ndarray]:
    positions = jnp.arange(length)[None]
    lengths = token_segment_lengths(positions, jnp.ones_like(positions))
    table = rope_table(rope, head_dim, positions[:, :_POSITIONS], lengths[:, :_POSITIONS])
    return [np.asarray(half)[0, :, 0] for half in table]


def _rope_fault(layer: int, rope: Rope, length: int, difference: float) -> str:
    kind = type(rope.scaling).__name__.removesuffix("Scaling") if rope.scaling else "default"
    return f"layers.{layer}.attn: cosines and sines of {kind} rope differ by {difference:.1e} at {length} tokens"
