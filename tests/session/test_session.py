"""The loop of every recipe: its number of steps, non-finite losses, and its end."""

import gzip
import itertools
import json
import signal

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import tiny
from chat_templates import CHATML, tokenizer

from jaxtrain.config import SourceSection, config_tree, parse_config
from jaxtrain.config.model import LoraSection
from jaxtrain.nn.heads import SCALAR
from jaxtrain.objectives.sft import SFT
from jaxtrain.objectives.value import ClippedValue
from jaxtrain.optim import make_schedule
from jaxtrain.recipes import sft
from jaxtrain.session.record import read_metrics
from jaxtrain.session.session import Session
from jaxtrain.train.guard import NonFiniteError

GOOD = tiny.packed_batch([[9, 20, 3], [14, 14]] * 4, 32)
BAD = GOOD._replace(loss_weights=np.where(GOOD.loss_weights > 0, np.inf, 0).astype(np.float32))

LORA = LoraSection(rank=2)


class NoState:
    """Batches without a state."""

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def config(tmp_path, **train):
    tree = {
        "recipe": "sft",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": tiny.HF_CONFIG, "compute_dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "train.jsonl"), "epochs": 1}, "max_length": 32},
        "train": {"steps": 10, "max_skipped_in_a_row": 3, **train},
        "log": {"every": 1, "to": []},
    }
    return parse_config(tree, "test")


def taken(tmp_path, batches, **train):
    """The steps of a loop over `batches`."""
    steps = []
    with Session.open(config(tmp_path, **train)) as session:
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        for batch in session.steps(batches):
            session.report(policy=policy.update(batch))
            steps.append(session.step + 1)
    return steps


def test_takes_train_steps_steps_and_reads_no_further_batch(tmp_path):
    batches = itertools.repeat(GOOD, 7)
    assert taken(tmp_path, batches, steps=5) == [1, 2, 3, 4, 5]
    assert len(list(batches)) == 2


def test_scattered_non_finite_steps_are_skipped_and_reported(tmp_path, caplog):
    assert taken(tmp_path, [GOOD, BAD, BAD, GOOD, BAD, GOOD]) == [1, 2, 3, 4, 5, 6]
    assert [record.args for record in caplog.records if "not finite" in record.msg] == [(2, 1), (3, 2), (5, 1)]
    assert not (tmp_path / "run" / "inspection").exists()


def test_too_many_consecutive_non_finite_steps_end_the_run_and_save_their_batches(tmp_path):
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 4"):
        taken(tmp_path, [GOOD, BAD, BAD, BAD, GOOD, GOOD])
    (file,) = (tmp_path / "run" / "inspection").iterdir()
    saved = np.load(file)["loss_weights"]
    assert sum(not np.isfinite(batch).all() for batch in saved) == 3


def test_the_last_step_is_checked_too(tmp_path):
    with pytest.raises(NonFiniteError):
        taken(tmp_path, [GOOD, BAD, BAD, BAD], steps=4)


def write_rows(tmp_path, lengths):
    rows = [{"input_ids": [7] * length} for length in lengths]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("by", ["run", "source"])
def test_a_schedule_spans_the_steps_that_an_epoch_makes(tmp_path, by, capsys):
    write_rows(tmp_path, [30, 12, 18, 40, 1] * 16)  # a row of one token has nothing to train
    run = config(tmp_path, steps=None, batch_size=8)
    train = run.train.model_copy(update={"epochs": 2 if by == "run" else None})
    section = run.data.train.model_copy(update={"epochs": 2 if by == "source" else None})
    optimizer = run.optimizer.model_copy(update={"learning_rate": 0.1, "schedule": "linear", "warmup_ratio": 0.3})
    data = run.data.model_copy(update={"train": section, "on_bad_row": "skip"})
    run = run.model_copy(update={"data": data, "optimizer": optimizer, "train": train})
    with pytest.warns(UserWarning, match="skipped a bad row"):
        outcome = sft.run(run)
    lines = read_metrics(tmp_path / "run")
    steps = len(lines)
    assert steps == 15
    schedule = make_schedule(run.optimizer, steps)
    assert [line["learning_rate"] for line in lines] == pytest.approx([float(schedule(step)) for step in range(steps)])
    assert lines[-1]["learning_rate"] == pytest.approx(0.1 / 10)  # the last of 10 steps from the peak to 0
    epochs = [line["epoch"] for line in lines]
    assert epochs == sorted(epochs) and epochs[0] < 0.5 and epochs[-1] == 2
    assert outcome.metrics["data/truncated"] == 32 and outcome.metrics["data/bad_rows"] == 32
    said = f"trained {steps} of {steps} steps, 2.00 epochs, 128 examples, 2,944 tokens, 32 truncated, 32 bad rows"
    assert said in (tmp_path / "run" / "logs" / "process_0.log").read_text()


def test_every_source_of_eval_has_a_loss_and_the_mean_is_over_their_tokens(tmp_path):
    write_rows(tmp_path, [30] * 24)
    (tmp_path / "long.jsonl.gz").write_bytes(gzip.compress(json.dumps({"input_ids": [*range(1, 31)]}).encode()))
    (tmp_path / "short.jsonl").write_text(json.dumps({"input_ids": [9, 8, 7]}) + "\n")
    run = config(tmp_path, batch_size=8, steps=3)
    held_out = [{"path": str(tmp_path / "long.jsonl.gz")}, {"path": str(tmp_path / "short.jsonl"), "name": "tiny"}]

    def losses(*sources):
        data = run.data.model_copy(update={"eval": [SourceSection(**source) for source in sources]})
        directory = run.run.model_copy(update={"dir": str(tmp_path / str(len(list(tmp_path.iterdir()))))})
        metrics = sft.run(run.model_copy(update={"data": data, "run": directory})).metrics
        return {name: value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("loss")}

    both = losses(*held_out)
    assert both.keys() == {"eval_long_loss", "eval_tiny_loss", "eval_loss"}
    assert both["eval_loss"] == pytest.approx((29 * both["eval_long_loss"] + 2 * both["eval_tiny_loss"]) / 31)
    assert losses(held_out[0]) == {"eval_loss": pytest.approx(both["eval_long_loss"])}
    assert losses(held_out[1]) == {
        name: pytest.approx(both["eval_tiny_loss"]) for name in ("eval_tiny_loss", "eval_loss")
    }


def test_data_that_end_before_the_steps_are_refused_before_the_first(tmp_path):
    write_rows(tmp_path, [30] * 24)
    with pytest.raises(ValueError, match=r"data.train ends after step 3, .* and train.steps=10: leave train.steps out"):
        sft.run(config(tmp_path, batch_size=8))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    sft.run(config(tmp_path, batch_size=8, steps=3))


def test_a_warm_up_beyond_the_counted_steps_is_refused(tmp_path):
    write_rows(tmp_path, [30] * 24)
    run = config(tmp_path, batch_size=8, steps=None)
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"warmup_steps": 4})})
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps=4 is more than the 3 steps that data.train makes"):
        sft.run(run)


def test_a_loop_that_ends_early_is_said_with_its_numbers(tmp_path, caplog, capsys):
    assert taken(tmp_path, [GOOD] * 3) == [1, 2, 3]
    assert "the data was exhausted after step 3 of 10: the learning rate was still 1.81e-05" in caplog.text
    assert "trained 3 of 10 steps" in capsys.readouterr().out
    assert taken(tmp_path, [GOOD] * 3) == []
    assert "is finished: the data was exhausted after step 3 of 10" in capsys.readouterr().out


def test_a_loop_of_ones_own_batches_needs_steps(tmp_path):
    with pytest.raises(ValueError, match="the number of steps is not known yet"):
        taken(tmp_path, [GOOD], steps=None, epochs=None)


def test_rows_beyond_the_positions_of_the_model_are_warned_of(tmp_path):
    run = config(tmp_path, steps=1)
    run = run.model_copy(update={"data": run.data.model_copy(update={"max_length": 65})})
    with (
        pytest.warns(UserWarning, match="data.max_length=65 is beyond the 64 positions that the model was made for"),
        Session.open(run) as session,
    ):
        session.restore(session.trained_role("policy", SFT()), data=NoState())


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
        critic = session.trained_role("critic", ClippedValue(0.2), model=section)
        session.restore(policy, critic, data=NoState())
        for placed in session.steps(itertools.repeat(batch)):
            session.report(policy=policy.update(placed), critic=critic.update(placed))
            steps.append(session.step + 1)
    assert steps == [1, 2, 3, 4]  # the host runs one step ahead of the device
    assert "step 1 of the critic was skipped" in caplog.text


def test_a_callback_is_called_at_its_interval_and_after_the_last_step(tmp_path):
    calls = []
    with Session.open(config(tmp_path, steps=5)) as session:
        policy = session.trained_role("policy", SFT())
        session.every(2, lambda session: calls.append(session.step))
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
    assert calls == [2, 4, 5]


CALLED = []


def note(session):
    CALLED.append(session.step)


def test_a_config_names_functions_to_call_or_is_given_them(tmp_path):
    (tmp_path / "notes.py").write_text("def note(session):\n    open(session.folder.path / 'noted', 'a').write('x')\n")
    callbacks = [{"every": 2, "function": note}, {"every": 3, "function": f"{tmp_path / 'notes.py'}:note"}]
    run = parse_config(config_tree(config(tmp_path, steps=5)) | {"callbacks": callbacks})
    assert [each["function"].rpartition(":")[2] for each in config_tree(run)["callbacks"]] == ["note", "note"]
    CALLED.clear()
    with Session.open(run) as session:
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
    assert CALLED == [2, 4, 5]
    assert (tmp_path / "run" / "noted").read_text() == "xx"  # after steps 3 and 5


def test_a_resumed_run_finds_its_callbacks_by_name(tmp_path):
    """A signal stops the run at step 2, at which the callback was due; a new one is put before it."""
    calls = []

    def old(session):
        calls.append(("old", session.step))

    def new(session):
        calls.append(("new", session.step))

    def run(*functions, stopped=False):
        with Session.open(config(tmp_path, steps=4)) as session:
            policy = session.trained_role("policy", SFT())
            for function in functions:
                session.every(2, function)
            session.restore(policy, data=NoState())
            if stopped:
                session._agreement.stopping = lambda: signal.SIGTERM if session.step == 2 else 0
            for batch in session.steps(itertools.repeat(GOOD)):
                session.report(policy=policy.update(batch))

    run(old, stopped=True)
    assert calls == []
    run(new, old)
    assert calls == [("old", 2), ("new", 4), ("old", 4)]


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


def test_the_keys_of_data_reach_the_encoder(tmp_path):
    tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    tree = {
        "recipe": "sft",
        "run": {"dir": str(tmp_path / "run")},
        "model": {"config": {**tiny.HF_CONFIG, "vocab_size": 512}, "tokenizer": str(tmp_path / "tokenizer")},
        "data": {"train": {"path": "none.jsonl"}, "merge": ["turns"], "loss_on": "last"},
        "train": {"steps": 1},
    }
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    with Session.open(parse_config(tree, "test")) as session:
        example = session.encoder(session.trained_role("policy", SFT()))({"messages": turns * 2})
        text, trained = (
            session.tokenizer.decode(example.input_ids[chosen]) for chosen in (..., example.loss_weights > 0)
        )
    assert text.count("a\n\nb") == 2 and trained == "c<|im_end|>"


def test_a_checkpoint_is_saved_when_its_minutes_have_passed(tmp_path):
    tree = config_tree(config(tmp_path, steps=4))
    with Session.open(parse_config(tree | {"checkpoint": {"every": 1000, "minutes": 1e-9, "keep": 9}})) as session:
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
    assert session.saved_steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("shapes_change", [False, True])
def test_a_resumed_run_says_that_its_step_was_compiled_again_only_if_it_was(tmp_path, caplog, shapes_change):
    tree = config_tree(config(tmp_path, steps=5)) | {"checkpoint": {"every": 2}}
    wider = tiny.packed_batch([[9, 20, 3], [14, 14]] * 4, 64)

    def go_on(batches):
        with Session.open(parse_config(tree)) as session:
            policy = session.trained_role("policy", SFT())
            session.restore(policy, data=NoState())
            for batch in session.steps(batches):
                session.report(policy=policy.update(batch))
        return session.step

    def killed():
        yield from [GOOD] * 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go_on(killed())
    assert "compiled" not in caplog.text
    assert go_on([GOOD, wider if shapes_change else GOOD, GOOD]) == 5
    assert ("the step was compiled 2 times" in caplog.text) == shapes_change


def test_a_run_goes_on_after_a_failed_save_and_saves_the_next_step(tmp_path, monkeypatch):
    whole = taken(tmp_path / "whole", itertools.repeat(GOOD), steps=6)
    write, failing = ocp.training.Checkpointer.save_checkpointables_async, [True]

    def fail_once(writer, step, parts, **arguments):
        if failing.pop() if failing else False:
            raise OSError(28, "No space left on device")
        return write(writer, step, parts, **arguments)

    monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", fail_once)
    settings = config_tree(config(tmp_path, steps=6)) | {"checkpoint": {"every": 3, "keep": 9}}
    with (
        pytest.warns(RuntimeWarning, match="could not save step 3 .*a newer step is saved"),
        Session.open(parse_config(settings, "test")) as session,
    ):
        policy = session.trained_role("policy", SFT())
        session.restore(policy, data=NoState())
        for batch in session.steps(itertools.repeat(GOOD)):
            session.report(policy=policy.update(batch))
    assert session.saved_steps() == [4, 6]
    losses = [[line["loss"] for line in read_metrics(tmp_path / folder / "run")] for folder in ("whole", "")]
    assert losses[0] == losses[1]
    assert len(whole) == 6
