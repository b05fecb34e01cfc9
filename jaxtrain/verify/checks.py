"""The checks of the verifier: each compares one property and reports it in one line."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.errors import ConversionError
from converters.families.registry import DERIVED, for_head, to_hf
from converters.quantization import QUANTIZATION
from converters.reference import Reference
from converters.safetensors_io import open_checkpoint
from converters.verify import RangeStatistics, compare_logits
from converters.weight_rows import by_name, flatten, fuse
from jaxtrain.types import Array, Batch, Params
from jaxtrain.verify.subject import Subject, as_batch, outputs, params_as, precise

LOGIT_TOLERANCE = 1e-4  # |ours - theirs|, for logits up to 10
RELATIVE_TOLERANCE = LOGIT_TOLERANCE / 10  # relative to the largest logit, for larger logits
GRADIENT_TOLERANCE = 1e-3  # |ours - theirs| / |theirs|, norms over a tensor
# Upper bounds, relative to transformers, for our float32 rounding and for our KL in the run's dtype.
ROUNDING_FACTOR, LOW_PRECISION_FACTOR = 4, 2
LAST_PLACE_FACTOR = 2  # tolerance relative to the effect of one unit in the last place of the rope frequencies
DECODED_TOKENS = 24  # tokens that are decoded one by one with the cache


Sides = dict[str, np.ndarray]
"""Logits [B, T, V] of one implementation, by dtype."""


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    summary: str
    ranges: list[RangeStatistics] = field(default_factory=list)  # of logits: all positions, then range by range


def exact_tolerance(logits: np.ndarray) -> float:
    """The tolerance in float64 for logits of this scale.

    Both implementations compute norms, rope and softmax in float32 even in a float64 model, so the remaining error is
    proportional to the logits: 1e-5 of their scale is about 170 times float32's rounding unit.
    """
    return max(LOGIT_TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(logits).max()))


def loading(reference: Reference) -> Check:
    name = f"transformers {reference.version} loads it"
    return Check(
        name,
        not reference.loading_problems,
        "; ".join(reference.loading_problems) or "no missing or unexpected tensors",
    )


def names_check(subject: Subject, reference: Reference) -> Check:
    """Every tensor of the folder must be written by an export and used by transformers, which drops some without a
    word (those of multi-token prediction)."""
    name, written = "names", {tensor.name for tensor in subject.tensors}
    derived = {each.format(layer=layer) for each in DERIVED for layer in range(subject.config.num_layers)}
    with open_checkpoint(subject.folder) as checkpoint:
        stored = checkpoint.entries.keys() - derived
    used = reference.owners().keys() | {tensor.name for tensor in subject.tensors if tensor.alias}
    lost, ignored = sorted(stored - written), sorted(stored - used)
    if lost:
        return Check(name, False, f"{len(lost)} tensors of the folder are lost on the way to an export, as {lost[0]}")
    if ignored:
        return Check(name, False, f"transformers ignores {len(ignored)} tensors of the folder, as {ignored[0]}")
    return Check(name, True, f"{len(stored)} names in, the same {len(written)} out, all used by transformers")


def round_trip(subject: Subject) -> Check:
    """Export the imported tensors in the stored dtype and compare them with the file, bit by bit."""
    leaves, changed = flatten(subject.params), []
    named = by_name(subject.tensors) | {tensor.name: [tensor] for tensor in subject.tensors if tensor.alias}
    with open_checkpoint(subject.folder) as checkpoint:
        for name, parts in named.items():
            back = fuse(parts, lambda tensor: np.asarray(leaves[tensor.ours][tensor.stack]))
            stored = checkpoint.read(name)
            if stored.tobytes() != back.astype(stored.dtype).tobytes():
                changed.append(name)
    name = "round trip"
    if changed:
        return Check(name, False, f"{len(changed)} of {len(subject.tensors)} tensors changed, such as {changed[0]}")
    try:
        again = for_head(to_hf(subject.config, subject.hf), subject.config, subject.scalar)
    except ConversionError as error:
        return Check(name, False, str(error))
    different = [key for key in again.keys() | subject.hf.keys() if again.get(key) != subject.hf.get(key)]
    # An export adds missing `architectures`, and is never quantised.
    if set(different) - ({"architectures"} - subject.hf.keys()) - {QUANTIZATION}:
        return Check(name, False, f"config.json changed its {min(set(different) - {QUANTIZATION})}")
    return Check(name, True, f"{len(subject.tensors)} tensors bit-identical, config.json unchanged")


def logit_checks(
    dtype: str, rows: Mapping[str, np.ndarray], ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> list[Check]:
    checks = []
    for row, kind in enumerate(rows):
        ranges = compare_logits(ours[row : row + 1], theirs[row : row + 1])
        difference, size = ranges[0].difference, np.abs(theirs[row]).max()
        summary = f"differ by at most {difference:.1e} (tolerance {tolerance:.1e}; logits up to {size:.0f})"
        if tolerance > exact_tolerance(theirs):
            summary += f": {LAST_PLACE_FACTOR} times the effect of the last place of rope's float32 frequencies"
        checks.append(Check(f"logits {dtype}, {kind}", difference < tolerance, summary, ranges))
    return checks


def excuse_rounding(check: Check, row: int, ours: Sides, theirs: Sides) -> Check:
    """Pass a float32 check above the tolerance if transformers rounds as much; float64 is known to agree."""
    if check.passed:
        return check
    rounding = [float(np.abs(side["float32"][row] - side["float64"][row]).max()) for side in (ours, theirs)]
    summary = (
        f"{check.summary}: rounding, since float64 agrees; float32 and float64 differ by {rounding[1]:.1e} in "
        f"transformers and by {rounding[0]:.1e} in ours"
    )
    return Check(check.name, rounding[0] < ROUNDING_FACTOR * rounding[1] + LOGIT_TOLERANCE, summary, check.ranges)


def low_precision(
    dtype: str, rows: Mapping[str, np.ndarray], ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray
) -> list[Check]:
    """Compare both implementations, in the run's dtype, with `exact`; our error must not be much larger.

    The median token decides, because rounding can change single tokens of a deep model by any amount.
    """
    checks = []
    for row, kind in enumerate(rows):
        one = slice(row, row + 1)
        ranges, other = compare_logits(ours[one], exact[one]), compare_logits(theirs[one], exact[one])
        if exact.shape[-1] == 1:  # scores of a reward model, which are no distribution
            medians = [float(np.median(np.abs(side[one] - exact[one]))) for side in (ours, theirs)]
            passed = medians[0] < LOW_PRECISION_FACTOR * medians[1] + 1e-6
            summary = f"median difference from the exact scores {medians[0]:.1e}, of transformers {medians[1]:.1e}"
            checks.append(Check(f"scores {dtype}, {kind}", passed, summary, ranges))
            continue
        passed = ranges[0].median_kl < LOW_PRECISION_FACTOR * other[0].median_kl + 1e-6
        summary = (
            f"KL to the exact logits: median {ranges[0].median_kl:.1e}, mean {ranges[0].kl:.1e}; "
            f"of transformers in {dtype} {other[0].median_kl:.1e}, {other[0].kl:.1e}"
        )
        checks.append(Check(f"logits {dtype}, {kind}", passed, summary, ranges))
    return checks


def decode_check(
    subject: Subject, ids: np.ndarray, dtype: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float
) -> Check:
    """Prefill, then decode token by token with the cache; compare with the logits of both full forward passes."""
    model, length = subject.model(dtype), ids.shape[1]
    filled = max(length - DECODED_TOKENS, 1)
    with precise(dtype):

        @functools.partial(jax.jit, donate_argnums=1)
        def extend(params: Params, cache: Any, tokens: Array, positions: Array) -> tuple[Array, Any]:
            hidden, cache = model.extend(params, tokens, positions, jnp.ones_like(tokens), cache)
            return outputs(model, params, hidden), cache

        params, cache = params_as(subject, dtype), model.empty_cache(len(ids), length)
        batch, parts = as_batch(ids), []
        for start, stop in [(0, filled), *((t, t + 1) for t in range(filled, length))]:
            part, cache = extend(params, cache, batch.tokens[:, start:stop], batch.positions[:, start:stop])
            parts.append(np.asarray(part))
    cached = np.concatenate(parts, 1)
    from_ours, from_theirs = np.abs(cached - ours).max(), np.abs(cached - theirs).max()
    summary = (
        f"{filled} tokens prefilled, {length - filled} decoded, in {dtype}: logits differ by at most {from_ours:.1e} "
        f"from ours without a cache, {from_theirs:.1e} from transformers"
    )
    return Check("cached decode", bool(from_ours < exact_tolerance(ours) and from_theirs < tolerance), summary)


def gradient_check(subject: Subject, reference: Reference, ids: np.ndarray, dtype: str) -> Check:
    """Compare gradients of the mean negative log-likelihood of the next token, or of the mean score of a reward model,
    in our layout."""
    model = subject.model(dtype, remat="full")
    with precise(dtype):

        def loss(params: Params, batch: Batch) -> Array:
            logits = outputs(model, params, model.hidden(params, batch))
            if subject.scalar:
                return logits.mean()
            logp = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(logp, batch.tokens[:, 1:, None], -1).mean()

        ours = flatten(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params_as(subject, dtype), as_batch(ids))))
    theirs, own = reference.gradients(ids), [tensor for tensor in subject.tensors if not tensor.alias]
    missing = [tensor.name for tensor in own if tensor.name not in theirs]
    if missing:
        return Check("gradients", False, f"transformers has no gradient of {missing[0]}")
    norms = {tensor.name: float(np.linalg.norm(theirs[tensor.name])) for tensor in own}
    # A gradient that is zero up to rounding (that of a bias of keys without rope) has no meaningful relative error.
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
