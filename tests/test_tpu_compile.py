"""The SFT step and the engine's decode compile for TPUs and fit their memory, by libtpu on a host without TPUs."""

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
# A forward kernel, whose residuals are kept, and one for all gradients.
SPLASH_CALLS = 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What is found of a program, by its name and arguments (see `tpu_programs.py`)."""
    errors = tmp_path_factory.mktemp("tpu") / "errors"
    command = [sys.executable, Path(__file__).with_name("tpu_programs.py")]
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)

    def found(*program):
        process.stdin.write(json.dumps(program) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, errors.read_text()[-4000:]
        return json.loads(line)

    yield found
    process.communicate()


@pytest.mark.parametrize(("topology", "tensor"), [("v5e:2x2", 2), ("v5p:2x2x2", 1)])
def test_a_tiny_step_compiles_with_splash_attention(compiled, topology, tensor):
    report = compiled("step", "tiny", topology, tensor, 8, 256, "full")
    assert report["splash_calls"] == SPLASH_CALLS


# Of a step: a small one that another test compiles too, and one whose layers have real widths, which takes minutes.
SMALL = ("tiny", "v5p:2x2x2", 1, 8, 256)
WIDE = ("8b-wide", "v5p:2x2x1", 1, 4, 1024)


# Products: queries, keys, values, the projection of the attention, gate and up; nothing needs the output of the layer.
@pytest.mark.parametrize(
    ("shape", "remat", "calls", "products"),
    [
        pytest.param(SMALL, "full", SPLASH_CALLS, 6, id="small-full"),
        pytest.param(WIDE, "full", SPLASH_CALLS, 6, id="full", marks=pytest.mark.big),
        pytest.param(WIDE, {}, SPLASH_CALLS + 1, 6, id="least", marks=pytest.mark.big),
        pytest.param(WIDE, {"gate": "keep", "up": "keep"}, SPLASH_CALLS + 1, 4, id="mlp", marks=pytest.mark.big),
    ],
)
def test_kept_activations_are_not_computed_again(compiled, shape, remat, calls, products):
    """Counted in compiled layers: a policy that does not see the products would compute them again."""
    every_product_kept = compiled("step", *shape, "dots")
    assert every_product_kept["splash_calls"] == SPLASH_CALLS
    report = compiled("step", *shape, remat)
    assert report["splash_calls"] == calls
    assert report["products"] - every_product_kept["products"] == products


@pytest.mark.slow
def test_the_8b_step_with_16_rows_of_8k_fits_v5p_with_room(compiled):
    report = compiled("step", "8b", "v5p:2x2x2", 2, 16, 8192)
    assert report["splash_calls"] == SPLASH_CALLS
    # fp32 parameters and two moments of 8.2e9 numbers, an eighth on each chip; the step gives their room back.
    assert 12e9 < report["arguments"] < 13e9
    assert report["not_donated"] < 1e6
    # Half of the memory, and what remat "full" keeps of attention: 36 layers, 2 rows of a chip, bfloat16.
    attention = 36 * 2 * 8192 * 4096 * 2
    assert report["arguments"] + report["temporaries"] < V5P_BYTES / 2 + attention


@pytest.mark.big
def test_the_step_of_a_hybrid_mixture_of_35b_fits_64_v5p(compiled):
    """A row of 4096 tokens for each chip: gated delta nets, attention, 256 experts and a shared one."""
    report = compiled("step", "35b-a3b", "v5p:4x4x4", 1, 64, 4096)
    # The loop is over periods of four layers, of which one has attention.
    assert report["splash_calls"] == SPLASH_CALLS
    assert report["arguments"] + report["temporaries"] < V5P_BYTES


def test_decode_does_not_copy_the_cache(compiled):
    """With another order of its axes, XLA would copy the keys and values of every layer twice at every call."""
    report = compiled("decode", "v5p:2x2x1", 4, 1024)
    assert report["temporaries"] < report["buffer"]


def test_decode_gathers_logits_and_not_the_head(compiled):
    """At a real vocabulary the head is 32 times as large as the logits of 64 slots."""
    report = compiled("decode", "v5p:2x2x1", 4, 151936)
    assert 0 < report["largest_gather"] <= report["logits"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "kinds", "most"), [("trained", ("forward_kl", "jsd"), 1.6), ("frozen", ("reverse_kl",), 1.9)]
)
def test_an_exact_divergence_costs_little_more_than_the_head_of_sft(compiled, head, kinds, most):
    """At the shapes of an 8B model: four matrix products for three, or three for two. The compiler's own estimates."""
    supervised = compiled("head", "sft", head == "trained")["cycles"]
    for kind in kinds:
        assert compiled("head", kind, head == "trained")["cycles"] < most * supervised


def test_experts_multiply_and_exchange_only_the_pairs_that_chose_them(compiled):
    """A layer of GPT-OSS-20B over one row for each of 8 devices, each of which holds 4 of its 32 experts."""
    report = compiled("experts", "gpt-oss-20b", "v5p:2x2x2", 8, 2048)
    # gate, up and down; gate and up again in the backward pass; three gradients of inputs, and three of kernels.
    assert report["kernels"] == {"gmm": 8, "tgmm": 3}
    assert report["exchanges"] == 8
    # Eleven products, for 4 experts of a token, in a buffer with half as much room again. Were the gradients of the
    # kernels dense, each of a device's 4 experts would multiply all of its rows.
    assert report["xla_flops"] < 1.6 * 11 * 2 * 2048 * 4 * 2880**2
    # Zeros for received rows, and sums over the experts of a token as reductions, were a fifth of a step on v6e.
    assert report["filled_buffers"] == 0
    assert report["sums_over_an_axis"] == 0
