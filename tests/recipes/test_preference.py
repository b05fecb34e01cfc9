"""Recipe preference: the same on any mesh, with any packing and any way to hold the reference."""

from pathlib import Path

import jax
import numpy as np
import pytest
from recipe_runs import check_killed_copy_goes_on, losses, train

from jaxtrain.config import ConfigError


@pytest.fixture
def place(preference_run) -> Path:
    return preference_run[0]


@pytest.fixture
def whole(preference_run):
    return preference_run[1]


def test_dpo_begins_at_log_2_and_learns(whole):
    assert losses(whole)[0] == pytest.approx(np.log(2), abs=1e-4)
    first, second = losses(whole, "eval_loss")
    assert second < first < np.log(2)
    assert whole[-1]["eval_rewards/margins"] > 0 and "eval_perplexity" not in whole[-1]


def test_packed_pairs_equal_padded_ones(place):
    """Held out, with the parameters hardly changed; SimPO's loss is not log 2 at the beginning."""
    once = ["objective=SimPO", "train.steps=1", "optimizer.learning_rate=1.0e-12"]
    packed, padded = (
        train(place, "packed", *once, "data.row_length=768"),
        train(place, "padded", *once, "data.packing=false"),
    )
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy"):
        assert packed[-1][key] == pytest.approx(padded[-1][key], rel=1e-5, abs=1e-6)
    assert packed[0]["packing_density"] > padded[0]["packing_density"]


def test_lora_compares_with_the_base(place):
    lora = ["model.lora={rank: 2, alpha: 4}"]
    found = train(place, "lora", *lora)
    assert losses(found)[0] == pytest.approx(np.log(2), abs=1e-6) and losses(found)[-1] < losses(found)[0]


def test_kto_learns_from_labels(place):
    """Pairs are two answers with labels."""
    found = train(place, "kto", "objective=KTO", "train.steps=6")
    assert losses(found)[0] == pytest.approx(0.5, abs=1e-5)  # 1 - s(0)
    first, second = losses(found, "eval_loss")
    assert second < first < 0.5


def test_a_killed_run_goes_on_exactly(place, whole):
    check_killed_copy_goes_on(place)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=SFT"], "reads neither pairs"),
        (["objective=BradleyTerry"], "BradleyTerry needs Reward"),
        (["objective=SimPO", "reference.cache=x"], "`reference` has no effect"),
        (["data.overlong=split"], "data.overlong=split does not go with recipe preference"),
        (["data.loss_on=all"], "data.loss_on=all does not go with recipe preference"),
        (["reference={cache: x, devices: 2}"], "no device holds the reference"),
        (["reference.devices=8"], "leaves none to train on"),
        (["data.row_length=100"], "data.row_length=100 is less than 192"),
        (["recipe=sft"], "`chosen` and `rejected` are a pair of answers"),
    ],
)
def test_what_does_not_fit_together_is_refused(place, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        train(place, "refused", *overrides)
    assert jax.device_count() == 8
