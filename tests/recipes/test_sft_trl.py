"""The losses of three steps on the same rows, here and in TRL's SFTTrainer: those of `benchmarks/losses.py`.

TRL's are computed in the interpreter that JAXTRAIN_TRL_PYTHON names (with trl, torch and datasets). Without it the test
is skipped. Here the model is split over eight devices.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = os.environ.get("JAXTRAIN_TRL_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="JAXTRAIN_TRL_PYTHON names no interpreter with TRL")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def losses():
    """The module of the benchmark, which imports its neighbours."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("losses", BENCHMARKS / "losses.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def both(losses, tmp_path_factory):
    """The folder of the model, and TRL's losses by the name of the case."""
    folder = tmp_path_factory.mktemp("trl")
    losses.make_model(folder)
    command = [PYTHON, BENCHMARKS / "losses.py", "--trl-side", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads((folder / "losses.json").read_text())


def test_the_first_losses_equal_trls(losses, both):
    folder, theirs = both
    cases = losses.cases()
    assert theirs.keys() == cases.keys()
    for name, case in cases.items():
        ours = losses.ours(folder, case, mesh={"preset": "fsdp_tensor", "tensor": 2})
        assert len(ours) == losses.STEPS and ours[0] != ours[-1], name
        assert ours == pytest.approx(theirs[name], rel=losses.TOLERANCE, abs=0), name
