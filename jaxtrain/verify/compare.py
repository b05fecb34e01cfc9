"""The verifier: compare a checkpoint under jaxtrain and transformers, and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from converters.errors import CheckpointError
from converters.reference import Reference
from converters.verify import Departure, Point
from jaxtrain.verify.checks import (
    LAST_PLACES,
    LOGIT_TOLERANCE,
    Check,
    decode_check,
    exact_tolerance,
    excuse_rounding,
    gradient_check,
    loading,
    logit_checks,
    low_precision,
    round_trip,
)
from jaxtrain.verify.locate import locate
from jaxtrain.verify.subject import Subject, load_subject, our_logits, token_rows


@dataclass(frozen=True)
class Report:
    source: str
    checks: list[Check]
    departure: Departure | None = None
    layers: list[Point] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return _all_passed(self.checks)


def verify(source: str, *, tokens: int, dtype: str, layers: bool, gradients: bool, decode: bool) -> Report:
    """`compare` for a folder, or for a model on the Hub. An error of our import is a failed check of the report.

    Raises ValueError if there is nothing to compare, or if torch is missing.
    """
    folder = find_checkpoint(source)
    try:
        subject = load_subject(folder)
    except CheckpointError as error:
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
    the tolerance, both sides are run in float64 to tell rounding from errors, and the further checks are made in
    float64. Raises ValueError if torch is missing or transformers cannot load the folder.
    """
    rows = token_rows(subject, tokens)
    ids = np.stack(list(rows.values()))
    reference = Reference(subject.folder, "float32")
    checks = [loading(reference), round_trip(subject)]
    judge, tolerance = "float32", LOGIT_TOLERANCE
    ours, theirs = {judge: our_logits(subject, ids, judge)}, {judge: reference.logits(ids)}
    logits = logit_checks(judge, rows, ours[judge], theirs[judge], tolerance)
    if not _all_passed(logits):
        judge = "float64"
        del reference  # before the next is made: each is as large as the checkpoint
        reference = Reference(subject.folder, judge)
        ours[judge], theirs[judge] = our_logits(subject, ids, judge), reference.logits(ids)
        last_place = float(np.abs(reference.logits_with_perturbed_rope(ids) - theirs[judge]).max())
        tolerance = max(exact_tolerance(theirs[judge]), LAST_PLACES * last_place)
        exact = logit_checks(judge, rows, ours[judge], theirs[judge], tolerance)
        if _all_passed(exact):
            logits = [excuse_rounding(check, row, ours, theirs) for row, check in enumerate(logits)]
        logits += exact
    checks += logits
    points, departure = [], None
    if layers or not _all_passed(logits):
        points, departure = locate(subject, reference, ids, judge)
    if decode:
        checks.append(decode_check(subject, ids, judge, ours[judge], theirs[judge], tolerance))
    if gradients:
        checks.append(gradient_check(subject, reference, ids[-1:], judge))
    if dtype != "float32":
        del reference
        reference = Reference(subject.folder, dtype)
        checks += low_precision(dtype, rows, our_logits(subject, ids, dtype), reference.logits(ids), theirs[judge])
    return Report(str(subject.folder), checks, None if _all_passed(logits) else departure, points if layers else [])


def _all_passed(checks: list[Check]) -> bool:
    return all(check.passed for check in checks)


def find_checkpoint(source: str) -> Path:
    """The folder `source`, or the snapshot of the model of that name on the Hub, from the local cache or downloaded.

    Raises CheckpointError if it is neither.
    """
    if Path(source).is_dir() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{source} is not a folder, and no model of that name is in the local Hugging Face cache or can be fetched "
            f"from the Hub: {str(error).splitlines()[0]}"
        ) from None
