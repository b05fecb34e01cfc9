"""Recipe distill with a teacher of another tokenizer: the same wherever it runs, and resumed exactly."""

from pathlib import Path

import numpy as np
import pytest
from aligned_tokenizers import pieces
from recipe_runs import STEPS, losses, prepare, train, write_teacher

from converters.tokenizer import save_tokenizer
from jaxtrain.config import ConfigError

ULD = "objective={name: ULD, top_k: 32}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The student's tokens are bytes, the teacher's are pieces of several."""
    folder = prepare(tmp_path_factory.mktemp("uld"), "distill")
    tokenizer = pieces()
    write_teacher(folder / "teacher", vocab_size=len(tokenizer))
    save_tokenizer(tokenizer, folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def whole(place):
    return train(place, "whole", ULD)


def test_loss_and_distance_fall(whole):
    for name in ("eval_loss", "eval_uld"):
        held_out = losses(whole, name)
        assert len(held_out) == STEPS // 2 and np.all(np.diff(held_out) < 0), (name, held_out)
    np.testing.assert_array_equal(losses(whole, "aligned"), 1)


def test_tokens_of_both_vocabularies_are_compared_directly(place):
    found = train(place, "gold", "objective=GOLD")
    held_out = losses(found, "eval_hybrid")
    assert np.all(np.diff(held_out) < 0) and found[0]["matched"] > 0 and found[0]["unmatched"] > 0
    mesh = "mesh={preset: fsdp_tensor, tensor: 2, fsdp: 2}"
    elsewhere = train(place, "gold elsewhere", "objective=GOLD", "teacher.devices=4", mesh, "train.microbatches=2")
    np.testing.assert_allclose(losses(elsewhere), losses(found), rtol=2e-5)


def test_where_it_runs_does_not_change_it(place, whole):
    """The teacher on its own devices; the student's vocabulary is sharded, and its batches are cut in two."""
    mesh = "mesh={preset: fsdp_tensor, tensor: 2, fsdp: 2}"
    found = train(place, "elsewhere", ULD, "teacher.devices=4", mesh, "train.microbatches=2")
    np.testing.assert_allclose(losses(found), losses(whole), rtol=2e-5)


def test_a_resumed_run_is_the_same(place, whole):
    train(place, "resumed", ULD, "train.steps=3")
    resumed = train(place, "resumed", ULD)
    for name in ("loss", "uld", "grad_norm"):
        np.testing.assert_array_equal(losses(resumed, name), losses(whole, name))


def test_a_model_that_is_its_own_teacher_has_no_distance(place):
    own = [f"model.path={place / 'teacher'}", "model.config=null", "model.tokenizer=null", "train.steps=1"]
    (first, *_) = train(
        place, "own", "objective={name: ULD, ce_weight: 0, top_k: 32}", *own, "teacher.param_dtype=float32"
    )
    assert first["uld"] < 1e-5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "has another tokenizer than the student.*recipe distill needs none with objective.name=ULD"),
        ([ULD, "teacher.cache=x"], "teacher.cache holds log-probabilities of the student's own ids"),
        (["objective={name: ULD, top_k: 300}"], "objective.top_k=300 is more than the 259 tokens"),
        ([ULD, "data.overlong=keep_completion"], "data.overlong=keep_completion would cut"),
        (["recipe=sft", "teacher=null", ULD], "needs the signals group_place, teacher_probs"),
    ],
)
def test_what_does_not_fit_together_is_refused(place, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        train(place, "refused", *overrides)
