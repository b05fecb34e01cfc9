"""Recipe distill: the same on any mesh and with the teacher on its own devices, and exact after a kill."""

from pathlib import Path

import numpy as np
import pytest
from recipe_runs import STEPS, check_killed_copy_goes_on, losses, prepare, train

from jaxtrain.config import ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("distill"), "distill")


@pytest.fixture(scope="module")
def whole(place):
    return train(place, "whole")


def test_the_held_out_divergence_falls_steadily(whole):
    held_out = losses(whole, "eval_divergence")
    assert len(held_out) == STEPS // 2 and np.all(np.diff(held_out) < 0)
    np.testing.assert_allclose(losses(whole, "eval_loss"), held_out)
    assert whole[-1]["eval_mean_token_accuracy"] >= 0 and "eval_perplexity" not in whole[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.devices=4", "mesh={fsdp: 4}"],
        ["mesh={preset: fsdp_tensor, tensor: 2, fsdp: 4}", "train.microbatches=2"],
    ],
    ids=["own-devices", "tensor-microbatches"],
)
def test_where_it_runs_does_not_change_it(place, whole, overrides):
    np.testing.assert_allclose(losses(train(place, "elsewhere", *overrides)), losses(whole), rtol=2e-5)


def test_lora_and_jsd_with_cross_entropy(place):
    found = train(place, "lora", "model.lora={rank: 2}", "objective={kind: jsd, beta: 0.2, ce_weight: 0.5}")
    assert losses(found, "eval_loss")[-1] < losses(found, "eval_loss")[0]
    for line in found:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["divergence"] + 0.5 * line["ce_loss"], rel=1e-4)


def test_a_killed_run_goes_on_exactly(place, whole):
    check_killed_copy_goes_on(place)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "`recipe: distill` and the section `teacher` belong together"),
        (["recipe=sft"], "`recipe: distill` and the section `teacher` belong together"),
        (["teacher.top_logps=8"], "top_logps is for `cache`"),
        (["teacher={path: x, cache: x, devices: 2}"], "no device holds the teacher"),
        (["teacher.devices=8"], "teacher.devices=8 of 8 devices leaves none"),
        (["objective.beta=0.3"], "only kind=jsd reads it"),
        (["objective.sparse=true"], "teacher.cache sets it"),
        (["teacher.cache=x", "objective.kind=jsd"], "needs the teacher's whole distribution"),
        (["objective.name=DPO"], "DPO needs the signals sign"),
    ],
)
def test_what_does_not_fit_together_is_refused(place, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        train(place, "refused", *overrides)
