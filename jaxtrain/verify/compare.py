"""The verifier: compares a checkpoint in jaxtrain and in transformers, and reports the differences."""

from dataclasses import dataclass, field

import numpy as np

from converters.errors import ConversionError
from converters.reference import Reference
from converters.verify import Mismatch, Point
from jaxtrain.hub import local_folder
from jaxtrain.verify.checks import (
    LAST_PLACE_FACTOR,
    LOGIT_TOLERANCE,
    Check,
    decode_check,
    exact_tolerance,
    excuse_rounding,
    gradient_check,
    loading,
    logit_checks,
    low_precision,
    names_check,
    round_trip,
)
from jaxtrain.verify.locate import locate
from jaxtrain.verify.packed import packed_check
from jaxtrain.verify.probes import boundaries, norm_check, rope_check
from jaxtrain.verify.subject import Subject, load_subject, our_logits, token_rows


@dataclass(frozen=True)
class Report:
    source: str
    checks: list[Check]
    mismatch: Mismatch | None = None
    layers: list[Point] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return _all_passed(self.checks)


def verify(source: str, *, tokens: int, dtype: str, layers: bool, gradients: bool, decode: bool) -> Report:
    """`compare` for a folder, or for a model on the Hub. If our import fails, the report has one failed check.

    Raises ValueError if the checkpoint is not found, if transformers cannot load it, or if torch is missing.
    """
    folder = local_folder(source)
    try:
        subject = load_subject(folder)
    except ConversionError as error:
        return Report(source, [Check("import", False, str(error))])
    return compare(subject, tokens=tokens, dtype=dtype, layers=layers, gradients=gradients, decode=decode)


def compare(
    subject: Subject,
    *,
    tokens: int = 600,
    dtype: str = "bfloat16",
    layers: bool = False,
    gradients: bool = False,
    decode: bool = False,
) -> Report:
    """Compare with transformers over `tokens` tokens, in float32 and in `dtype`.

    `layers` lists every layer even if the logits agree; `gradients` and `decode` add those checks. If float32 exceeds
    the tolerance, both run in float64 to distinguish rounding from errors, and the remaining checks use float64.
    Raises ValueError if torch is missing or transformers cannot load the folder.
    """
    rows = token_rows(subject, tokens)
    ids = np.stack(list(rows.values()))
    reference = Reference(subject.folder, "float32")
    checks = [loading(reference), names_check(subject, reference), round_trip(subject)]
    checks += [norm_check(subject, reference, "float32"), *filter(None, [rope_check(subject, reference, tokens)])]
    judge, tolerance = "float32", LOGIT_TOLERANCE
    ours, theirs = {judge: our_logits(subject, ids, judge)}, {judge: reference.logits(ids)}
    logits = logit_checks(judge, rows, ours[judge], theirs[judge], tolerance)
    if not _all_passed(logits):
        judge = "float64"
        del reference  # free its memory before the next one is loaded
        reference = Reference(subject.folder, judge)
        ours[judge], theirs[judge] = our_logits(subject, ids, judge), reference.logits(ids)
        last_place = float(np.abs(reference.logits_with_perturbed_rope(ids) - theirs[judge]).max())
        tolerance = max(exact_tolerance(theirs[judge]), LAST_PLACE_FACTOR * last_place)
        exact = logit_checks(judge, rows, ours[judge], theirs[judge], tolerance)
        if _all_passed(exact):
            logits = [excuse_rounding(check, row, ours, theirs) for row, check in enumerate(logits)]
        logits += exact
    checks += logits
    if _all_passed(logits[-len(rows) :]):  # else these fail as well
        checks += _at_boundaries(subject, reference, ids, judge, tolerance)
        checks.append(packed_check(subject, reference, ids[-1], judge, tolerance))
    points, mismatch = [], None
    if layers or not _all_passed(logits):
        points, mismatch = locate(subject, reference, ids, judge)
    if decode:
        checks.append(decode_check(subject, ids, judge, ours[judge], theirs[judge], tolerance))
    if gradients:
        checks.append(gradient_check(subject, reference, ids[-1:], judge))
    if dtype != "float32":
        del reference
        reference = Reference(subject.folder, dtype)
        checks.append(norm_check(subject, reference, dtype))
        checks += low_precision(dtype, rows, our_logits(subject, ids, dtype), reference.logits(ids), theirs[judge])
    return Report(str(subject.folder), checks, None if _all_passed(logits) else mismatch, points if layers else [])


def _at_boundaries(
    subject: Subject, reference: Reference, ids: np.ndarray, dtype: str, tolerance: float
) -> list[Check]:
    """Logits of rows whose lengths are those about which a rope changes, if these are not longer than ids [B, T]."""
    checks = []
    for length in (each for each in boundaries(subject.config) if each <= ids.shape[1]):
        row = ids[-1:, :length]
        ours, theirs = our_logits(subject, row, dtype), reference.logits(row)
        checks += logit_checks(dtype, {f"{length} tokens, where rope changes": row}, ours, theirs, tolerance)
    return checks


def _all_passed(checks: list[Check]) -> bool:
    return all(check.passed for check in checks)
