"""The loop of every recipe: how many steps it takes, what it does with losses that are not finite, and when it ends."""

import itertools
import json

import numpy as np
import pytest
import tiny

from jaxtrain.config import parse_config
from jaxtrain.config.sections import LoraSection
from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.sft import SFT
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.recipes import sft
from jaxtrain.session.record import read_metrics
from jaxtrain.session.session import Session
from jaxtrain.train.guard import NonFiniteError

GOOD = tiny.packed_batch([[9, 20, 3], [14, 14]] * 4, 32)
BAD = GOOD._replace(loss_weights=np.where(GOOD.loss_weights > 0, np.inf, 0).astype(np.float32))
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 101,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}

LORA = LoraSection(rank=2)


class NoState:
    """Batches that are not resumed."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def config(tmp_path, **train):
    tree = {
        "recipe": "sft",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": MODEL, "compute_dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "train.jsonl"), "epochs": 1}, "max_length": 32},
        "train": {"steps": 10, "max_skipped_in_a_row": 3, **train},
        "log": {"every": 1, "tensorboard": False},
    }
    return parse_config(tree, "test")


def taken(tmp_path, batches, **train):
    """The steps that a loop over `batches` takes."""
    steps = []
    with Session.open(config(tmp_path, **train)) as session:
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
            steps.append(session.step + 1)
    return steps


def test_takes_as_many_steps_as_asked_and_no_batch_more(tmp_path):
    batches = itertools.repeat(GOOD, 7)
    assert taken(tmp_path, batches, steps=5) == [1, 2, 3, 4, 5]
    assert len(list(batches)) == 2


def test_scattered_bad_steps_are_skipped_and_said(tmp_path, caplog):
    assert taken(tmp_path, [GOOD, BAD, BAD, GOOD, BAD, GOOD]) == [1, 2, 3, 4, 5, 6]
    assert [record.args for record in caplog.records if "not finite" in record.msg] == [(2, 1), (3, 2), (5, 1)]
    assert not (tmp_path / "run" / "inspection").exists()


def test_too_many_bad_steps_in_a_row_end_the_run_with_their_batches_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 4"):
        taken(tmp_path, [GOOD, BAD, BAD, BAD, GOOD, GOOD])
    (file,) = (tmp_path / "run" / "inspection").iterdir()
    saved = np.load(file)["loss_weights"]
    assert sum(not np.isfinite(batch).all() for batch in saved) == 3


def test_the_last_step_is_looked_at_too(tmp_path):
    with pytest.raises(NonFiniteError):
        taken(tmp_path, [GOOD, BAD, BAD, BAD], steps=4)


def test_ends_where_the_data_end(tmp_path, caplog):
    rows = [{"input_ids": list(range(1, 31))} for _ in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.run(config(tmp_path, batch_size=8))
    assert "exhausted after step 3 of 10" in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_critic_whose_updates_are_all_skipped_ends_the_run(tmp_path, caplog):
    signals = {"values": np.zeros_like(GOOD.loss_weights), "returns": np.full_like(GOOD.loss_weights, np.inf)}
    batch = GOOD._replace(signals=signals)
    run = config(tmp_path)
    steps = []
    with (
        pytest.raises(NonFiniteError, match=r"3 steps of the critic in a row up to step 3.*rl\.critic\.learning_rate"),
        Session.open(run) as session,
    ):
        policy = session.trained_role("policy", SFT())
        section = run.model.model_copy(update={"head": SCALAR})
        critic = session.trained_role("critic", ClippedValue(), model=section)
        session.restore(policy, critic, data=NoState())
        for placed in session.steps(itertools.repeat(batch)):
            session.report(policy=policy.update(placed), critic=critic.update(placed))
            steps.append(session.step + 1)
    assert steps == [1, 2, 3, 4]  # the host runs one step ahead of the device
    assert "step 1 of the critic was skipped" in caplog.text


def test_a_function_is_called_every_so_many_steps_and_after_the_last(tmp_path):
    calls = []
    with Session.open(config(tmp_path, steps=5)) as session:
        policy = session.trained_role("policy", SFT())
        session.every(2, lambda session: calls.append(session.step))
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
    assert calls == [2, 4, 5]


def test_frozen_weights_are_not_donated(tmp_path):
    run = config(tmp_path, steps=2)
    run = run.model_copy(update={"model": run.model.model_copy(update={"lora": LORA})})
    with Session.open(run) as session:
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        before = policy.frozen["embed"]["weight"]
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
        assert policy.frozen["embed"]["weight"] is before and not before.is_deleted()
