"""A report says the same as tables and as JSON."""

import json

import numpy as np
import pytest

from converters.verify import Mismatch, Point, compare_logits
from jaxtrain.verify.checks import Check
from jaxtrain.verify.compare import Report
from jaxtrain.verify.printed import print_report

LOGITS = np.random.default_rng(0).normal(size=(1, 40, 11))
CHECKS = [
    Check("round trip", True, "3 tensors bit-identical"),
    Check("logits float32, text", False, "differ by 1 [red]", compare_logits(LOGITS, LOGITS + 1)),
]
MISMATCH = Mismatch("layers.1.attn", "model.layers.1.self_attn", "o_proj", "rope", 0.5, 37)
REPORT = Report("a/folder", CHECKS, MISMATCH, [Point("layers.0", "model.layers.0", "in", 1e-7, -1)])


def test_json_holds_the_verdict_and_every_number(capsys):
    print_report(REPORT, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] is False and told["source"] == "a/folder"
    assert [check["passed"] for check in told["checks"]] == [True, False]
    assert told["checks"][1]["ranges"][0]["difference"] == pytest.approx(1)
    assert told["mismatch"]["position"] == 37 and told["layers"][0]["path"] == "layers.0"


def test_tables_begin_with_the_verdict_and_name_what_failed(capsys):
    print_report(REPORT, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED (logits float32, text): a/folder"
    assert lines[1].startswith("first mismatch at layers.1.attn (o_proj), in transformers model.layers.1.self_attn")
    text = "\n".join(lines)
    assert "differ by 1 [red]" in text  # as it is: no markup
    assert "16-40" in text and "model.layers.0" in text
    print_report(Report("a/folder", CHECKS[:1]), as_json=False)
    assert capsys.readouterr().out.startswith("PASSED: a/folder")
