"""The SFT step and the engine's decode compile for TPUs and fit them, by their own compiler on a host without one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu, so nothing can be compiled for TPU: install jax[tpu]"
)

V5P_BYTES = 95e9
# A forward kernel, the same again in the backward pass (full remat), and one each for dq and for dk and dv.
SPLASH_CALLS = 4


def compiled(shape, topology, *, tensor, rows, length):
    return run("tpu_step.py", shape, topology, tensor, rows, length)


def run(program, *arguments):
    command = [sys.executable, Path(__file__).with_name(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tensor", [1, 2], ids=["fsdp", "fsdp-tensor"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x2"])
def test_a_tiny_step_compiles_with_splash_attention(topology, tensor):
    report = compiled("tiny", topology, tensor=tensor, rows=8, length=256)
    assert report["splash_calls"] == SPLASH_CALLS


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2], ids=["fsdp", "fsdp-tensor"])
def test_the_8b_step_with_16_rows_of_8k_fits_v5p_with_room(tensor):
    report = compiled("8b", "v5p:2x2x2", tensor=tensor, rows=16, length=8192)
    assert report["splash_calls"] == SPLASH_CALLS
    # fp32 parameters and two moments of 8.2e9 numbers, an eighth on each chip; the step gives their room back.
    assert 12e9 < report["arguments"] < 13e9
    assert report["not_donated"] < 1e6
    assert report["arguments"] + report["temporaries"] < V5P_BYTES / 2


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_decode_takes_the_cache_as_it_lies(tensor):
    """In another order of its axes XLA copies every layer's keys and values, there and back, at every call."""
    report = run("tpu_decode.py", "v5p:2x2x1", tensor)
    assert report["temporaries"] < report["buffer"]
