"""A report says what fits, what bounds the step, and what it costs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from jaxtrain.plan.compile import Compiled
from jaxtrain.plan.estimate import StateEstimate
from jaxtrain.plan.prices import CallPrice
from jaxtrain.plan.reading import Collective, Reading, TimedPart
from jaxtrain.plan.report import Phase, RunPlan, bound, estimate_text, plan_text
from jaxtrain.plan.target import parse_target
from jaxtrain.plan.transfer import WeightTransfer

FOUND = StateEstimate(8_000_000_000, 8_000_000_000, {"fsdp": 8}, 4e9, 4e9, 8e9, 131072, 7e15, 1.9)
TARGET = parse_target("v5p:2x2x2")


def program(name: str, times: float = 1):
    mesh = SimpleNamespace(size=8)
    return SimpleNamespace(name=name, times=times, flops=7e15, tokens=131072, mesh=mesh, inputs={}, gradients=None)


def reading(fusions: float, kernels: float = 0.0, exposed: float = 0.0, hidden: float = 0.0):
    def collective(seconds: float, hidden: bool) -> Collective:
        return Collective("all-gather", "fsdp", 8, 1e9, seconds, hidden, "nn/mlp.py:3")

    part = TimedPart(fusions, 36, "nn/mlp.py:12", "jit(step)/dot_general")
    kernel = CallPrice("splash_mha_fwd", 1e12, kernels), TimedPart(kernels, 36, "ops/tpu/splash.py:5", "splash")
    return Reading([part], [kernel], [collective(exposed, False), collective(hidden, True)])


def plan(*phases: Phase, price: float | None = None) -> RunPlan:
    return RunPlan("sft", TARGET, FOUND, phases, price=price, steps=1000, step_tokens=131072)


def test_the_step_is_the_sum_of_its_programs_as_often_as_they_run():
    phases = [
        Phase(program("update"), Compiled("", 1.0, peak=30 * 10**9), reading(2.0, 1.0, 0.5, 9.0)),
        Phase(program("score", times=2), Compiled("", 1.0, peak=10**9), reading(0.25)),
    ]
    made = plan(*phases, price=4.0)
    assert made.seconds == pytest.approx(3.5 + 2 * 0.25)
    assert made.mfu == pytest.approx(7e15 / (8 * 459e12 * 3.5))
    assert made.tokens_per_second_per_chip == pytest.approx(131072 / 4.0 / 8)
    assert made.cost == pytest.approx(4.0 * 8 * 4.0 * 1000 / 3600)
    text = plan_text(made, profile=1)
    for words in ("step: 4.000 s predicted (update 3.500, score 0.500)", "fits: 30.00 GB of 95.70 GB", "65.70 GB free"):
        assert words in text
    assert "nn/mlp.py:12" in text
    json = made.as_json(profile=1)
    assert json["mfu"] == made.mfu
    assert json["fits"] is True
    assert json["programs"]["update"]["profile"][0]["where"] == "nn/mlp.py:12"


def test_the_step_contains_the_transfer_of_weights():
    phase = Phase(program("update"), Compiled("", 1.0, peak=30 * 10**9), reading(2.0))
    made = replace(plan(phase), transfer=WeightTransfer(32 * 10**9, 2, 0.5))
    assert made.seconds == pytest.approx(2.5)
    text = plan_text(made)
    assert "weights to 2 engines of other devices: 32.00 GB, 0.5000 s" in text
    assert "(update 2.000, weights 0.500)" in text
    assert made.as_json()["transfer"] == {"bytes": 32 * 10**9, "engines": 2, "seconds": 0.5}


def test_what_other_phases_need_counts_against_the_memory():
    alone = Phase(program("decode"), Compiled("", 1.0, peak=60 * 10**9), reading(1.0))
    beside = Phase(program("decode"), Compiled("", 1.0, peak=60 * 10**9), reading(1.0), {"optimizer": 40 * 10**9})
    assert plan(alone).fits
    assert not plan(beside).fits
    assert "does not fit: 100.00 GB of 95.70 GB HBM a device, in decode; 4.30 GB too much" in plan_text(plan(beside))


def test_a_refused_program_does_not_fit():
    refused = Phase(program("update"), Compiled("", 1.0, refused=111 * 10**9), None)
    made = plan(refused)
    assert made.fits is False
    assert made.seconds is None
    assert made.mfu is None
    assert "15.30 GB too much" in plan_text(made)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ((3.0, 1.0, 0.5, 0.0), "matrix products"),
        ((1.0, 3.0, 0.5, 0.0), "attention"),
        ((1.0, 1.0, 3.0, 0.0), "exposed collectives"),
        ((1.0, 1.0, 0.5, 2.5), "interconnect"),
    ],
)
def test_what_bounds_a_step_is_its_largest_part(parts, word):
    assert word in bound(Phase(program("update"), Compiled("", 1.0), reading(*parts)))


def test_the_estimate_says_that_the_state_alone_is_too_large():
    small = parse_target("v5e:2x4")
    assert "does not fit 16.0 GB" in estimate_text("sft", small, replace(FOUND, parameter_bytes=9e9))
    text = estimate_text("sft", TARGET, FOUND)
    assert "8.000e9 parameters" in text
    assert "16.00 GB a device without activations" in text
    assert "does not fit" not in text
