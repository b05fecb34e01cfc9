"""The checks on logits: what they pass, and what they excuse."""

import dataclasses
import re

import hf_folders
import jax
import numpy as np
import pytest
from planted import SMALL, ids
from safetensors.numpy import save_file

import jaxtrain.nn.attention as attention
from converters.errors import ConversionError
from converters.reference import Reference
from jaxtrain.nn.rope import apply_rope
from jaxtrain.verify import load_subject
from jaxtrain.verify.checks import (
    Check,
    exact_tolerance,
    excuse_rounding,
    gradient_check,
    logit_checks,
    low_precision,
    names_check,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 40, 11)).astype(np.float64)
ROWS = {"random ids": np.arange(40), "text": np.arange(40)}


def test_each_row_is_judged_by_its_own_largest_difference():
    ours = LOGITS.copy()
    ours[1, 20, 3] += 2e-3
    first, second = logit_checks("float32", ROWS, ours, LOGITS, 1e-3)
    assert (first.name, first.passed) == ("logits float32, random ids", True)
    assert (second.name, second.passed) == ("logits float32, text", False)
    assert "differ by at most 2.0e-03 (tolerance 1.0e-03" in second.summary
    late = [each for each in second.ranges[1:] if each.difference > 1e-3]
    assert [(each.start, each.stop) for each in late] == [(16, 40)]


def test_the_tolerance_in_float64_grows_with_the_logits():
    assert exact_tolerance(LOGITS) == exact_tolerance(LOGITS / 10) == 1e-4
    assert exact_tolerance(100 * LOGITS) == pytest.approx(1e-3 * np.abs(LOGITS).max())


@pytest.mark.parametrize(("ours", "excused"), [(2.0, True), (10.0, False)])
def test_rounding_is_excused_where_transformers_rounds_about_as_much(ours, excused):
    """`ours`: how many times as far our float32 is from our float64 as theirs from its own."""
    noise = 1e-2 * RNG.normal(size=LOGITS.shape)
    sides = {"float64": LOGITS, "float32": LOGITS + ours * noise}, {"float64": LOGITS, "float32": LOGITS + noise}
    check = excuse_rounding(Check("logits", False, "differ"), 0, *sides)
    assert check.passed == excused and "rounding" in check.summary


def test_a_check_that_passed_needs_no_excuse():
    check = Check("logits", True, "agree")
    assert excuse_rounding(check, 0, {}, {}) is check


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (3.0, False)])
def test_in_low_precision_the_median_token_may_be_twice_as_far_as_theirs(factor, passed):
    noise = 0.05 * RNG.normal(size=LOGITS.shape)
    ours = LOGITS + factor * noise
    ours[:, 7] += 5 * np.eye(11)[0]  # one token is far off on either side, which the median leaves out
    checks = low_precision("bfloat16", ROWS, ours, LOGITS + noise, LOGITS)
    assert [check.passed for check in checks] == [passed, passed]


def test_a_gradient_that_does_not_flow_is_named(loaded, monkeypatch):
    subject, reference = loaded("granite")
    monkeypatch.setattr(attention, "apply_rope", lambda x, table: jax.lax.stop_gradient(apply_rope(x, table)))
    check = gradient_check(subject, reference, ids(subject), "float32")
    assert not check.passed and re.search("[qk]_proj", check.summary), check


def test_tensors_that_transformers_drops_are_named(tmp_path):
    """Those of multi-token prediction, and those that a table of rows has lost."""
    hf_folders.save(tmp_path, "qwen3", **SMALL)
    subject = load_subject(tmp_path)
    reference = Reference(tmp_path, "float32")
    lost = dataclasses.replace(subject, tensors=[t for t in subject.tensors if "q_norm" not in t.name])
    assert "2 tensors of the folder are lost" in names_check(lost, reference).summary
    stored = hf_folders.tensors(tmp_path)
    stored["mtp.layers.0.input_layernorm.weight"] = np.ones(56, np.float32)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lost on the way to an export, as mtp.layers.0" in names_check(subject, reference).summary
    with pytest.raises(ConversionError, match=r"holds tensor mtp\.layers\.0\.input_layernorm\.weight"):
        load_subject(tmp_path)
