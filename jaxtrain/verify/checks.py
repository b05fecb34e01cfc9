"""The checks: each compares one property and reports it in one line."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.errors import CheckpointError
from converters.families.registry import FAMILIES
from converters.reference import Reference
from converters.rows import by_name, flatten, join
from converters.safetensors_io import open_checkpoint
from converters.verify import Span, compare_logits
from jaxtrain.types import Array, Batch, Params
from jaxtrain.verify.subject import Subject, as_batch, params_as, precise

LOGIT_TOLERANCE = 1e-4  # |ours - theirs|, for logits up to 10
RELATIVE_TOLERANCE = LOGIT_TOLERANCE / 10  # of the largest logit, where logits are larger
GRADIENT_TOLERANCE = 1e-3  # |ours - theirs| / |theirs|, norms over a tensor
ROUNDING = 4  # our float32 may be this many times as far from our float64 as that of transformers is from its own
LOW_PRECISION = 2  # our KL in the run's dtype may be this many times that of transformers
LAST_PLACES = 2  # times the effect of one unit in the last place of the rope frequencies on the logits
DECODED = 24  # tokens that are decoded one by one over the cache


Sides = dict[str, np.ndarray]
"""Logits [B, T, V] of one side, by dtype."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    summary: str
    spans: list[Span] = field(default_factory=list)  # of logits: all positions, then range by range


def exact_tolerance(logits: np.ndarray) -> float:
    """The tolerance in float64 for logits of this scale.

    Both sides compute norms, rope and softmax in float32 even in a float64 model, so the error that remains is relative
    to the scale of the logits: 1e-5 of it is about 170 times float32's rounding unit.
    """
    return max(LOGIT_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(logits).max()))


def loading(reference: Reference) -> Check:
    name = f"transformers {reference.version} loads it"
    return Check(
        name,
        not reference.loading_problems,
        "; ".join(reference.loading_problems) or "no missing or unexpected tensors",
    )


def round_trip(subject: Subject) -> Check:
    """Compare the imported tensors, exported again in the stored dtype, with the file, bit by bit."""
    leaves, changed = flatten(subject.params), []
    named = by_name(subject.tensors) | {tensor.name: [tensor] for tensor in subject.tensors if tensor.alias}
    with open_checkpoint(subject.folder) as checkpoint:
        for name, parts in named.items():
            back = join(parts, lambda tensor: np.asarray(leaves[tensor.ours][tensor.stack]))
            stored = checkpoint.read(name)
            if stored.tobytes() != back.astype(stored.dtype).tobytes():
                changed.append(name)
    name = "round trip"
    if changed:
        return Check(name, False, f"{len(changed)} of {len(subject.tensors)} tensors came back changed: {changed[0]}")
    try:
        again = FAMILIES[subject.config.family].to_hf(subject.config, subject.hf)
    except CheckpointError as error:
        return Check(name, False, str(error))
    different = [key for key in again.keys() | subject.hf.keys() if again.get(key) != subject.hf.get(key)]
    # A folder without `architectures` gets them.
    if set(different) - ({"architectures"} - subject.hf.keys()):
        return Check(name, False, f"config.json came back with another {min(different)}")
    return Check(name, True, f"{len(subject.tensors)} tensors bit-identical, config.json unchanged")


def logit_checks(
    dtype: str, rows: Mapping[str, np.ndarray], ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> list[Check]:
    checks = []
    for row, kind in enumerate(rows):
        spans = compare_logits(ours[row : row + 1], theirs[row : row + 1])
        difference, size = spans[0].difference, np.abs(theirs[row]).max()
        summary = f"differ by at most {difference:.1e} (tolerance {tolerance:.1e}; logits up to {size:.0f})"
        if tolerance > exact_tolerance(theirs):
            summary += f": {LAST_PLACES} times the effect of the last place of rope's float32 frequencies"
        checks.append(Check(f"logits {dtype}, {kind}", difference < tolerance, summary, spans))
    return checks


def excuse_rounding(check: Check, row: int, ours: Sides, theirs: Sides) -> Check:
    """Pass a float32 check that exceeds the tolerance, given that float64 does not, if transformers rounds as much."""
    if check.passed:
        return check
    rounding = [float(np.abs(side["float32"][row] - side["float64"][row]).max()) for side in (ours, theirs)]
    summary = (
        f"{check.summary}: rounding, since float64 agrees; transformers is {rounding[1]:.1e} away from its own "
        f"float64, ours {rounding[0]:.1e} from ours"
    )
    return Check(check.name, rounding[0] < ROUNDING * rounding[1] + LOGIT_TOLERANCE, summary, check.spans)


def low_precision(
    dtype: str, rows: Mapping[str, np.ndarray], ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray
) -> list[Check]:
    """Both sides round in the run's dtype; ours may not be much further from `exact` than theirs.

    The median token decides, because rounding can change single tokens of a deep model by any amount on either side.
    """
    checks = []
    for row, kind in enumerate(rows):
        one = slice(row, row + 1)
        spans, other = compare_logits(ours[one], exact[one]), compare_logits(theirs[one], exact[one])
        passed = spans[0].median_kl < LOW_PRECISION * other[0].median_kl + 1e-6
        summary = (
            f"KL to the exact ones: median {spans[0].median_kl:.1e}, mean {spans[0].kl:.1e}; "
            f"of transformers in {dtype} {other[0].median_kl:.1e}, {other[0].kl:.1e}"
        )
        checks.append(Check(f"logits {dtype}, {kind}", passed, summary, spans))
    return checks


def decode_check(
    subject: Subject, ids: np.ndarray, dtype: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> Check:
    """Prefill, then decode token by token over the cache; compare with both sides' logits of the full sequence."""
    model, length = subject.model(dtype), ids.shape[1]
    filled = max(length - DECODED, 1)
    with precise(dtype):

        @functools.partial(jax.jit, donate_argnums=1)
        def extend(params: Params, cache: Any, tokens: Array, positions: Array) -> tuple[Array, Any]:
            hidden, cache = model.extend(params, tokens, positions, jnp.ones_like(tokens), cache)
            return model.logits(params, hidden), cache

        params, cache = params_as(subject, dtype), model.empty_cache(len(ids), length)
        batch, parts = as_batch(ids), []
        for start, stop in [(0, filled), *((t, t + 1) for t in range(filled, length))]:
            part, cache = extend(params, cache, batch.tokens[:, start:stop], batch.positions[:, start:stop])
            parts.append(np.asarray(part))
    cached = np.concatenate(parts, 1)
    from_ours, from_theirs = np.abs(cached - ours).max(), np.abs(cached - theirs).max()
    summary = (
        f"{filled} tokens at once, {length - filled} one by one, in {dtype}: logits differ by at most {from_ours:.1e} "
        f"from ours without a cache, {from_theirs:.1e} from transformers"
    )
    return Check("cached decode", bool(from_ours < exact_tolerance(ours) and from_theirs < tolerance), summary)


def gradient_check(subject: Subject, reference: Reference, ids: np.ndarray, dtype: str) -> Check:
    """Compare gradients of the mean negative log-likelihood of the next token, in our layout."""
    model = subject.model(dtype, remat="full")
    with precise(dtype):

        def loss(params: Params, batch: Batch) -> Array:
            logits = model.logits(params, model.hidden(params, batch))
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, batch.tokens[:, 1:, None], -1).mean()

        ours = flatten(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params_as(subject, dtype), as_batch(ids))))
    theirs, own = reference.gradients(ids), [tensor for tensor in subject.tensors if not tensor.alias]
    missing = [tensor.name for tensor in own if tensor.name not in theirs]
    if missing:
        return Check("gradients", False, f"transformers has no gradient of {missing[0]}")
    norms = {tensor.name: float(np.linalg.norm(theirs[tensor.name])) for tensor in own}
    # A gradient that is zero except for rounding (that of a bias of keys without rope) cannot be compared relatively.
    floor = 1e-5 * max(norms.values())
    errors = {}
    for tensor in own:
        difference = ours[tensor.ours][tensor.stack] - tensor.to_ours_in_full(theirs[tensor.name])
        error = float(np.linalg.norm(difference)) / max(norms[tensor.name], floor)
        errors[tensor.name] = max(error, errors.get(tensor.name, 0.0))  # a fused tensor has several parts
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    summary = f"{len(own)} tensors, in {dtype}; relative errors up to " + ", ".join(
        f"{errors[name]:.1e} ({name})" for name in worst
    )
    return Check("gradients", errors[worst[0]] < GRADIENT_TOLERANCE, summary)
