import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from trajectories import trajectory

from jaxtrain.rl.trajectories import TRAJECTORIES, Replay, read_step, recorded_steps, sample_table, write_step


def sample(number=0, index=0, **changes):
    made = trajectory(
        number=number, sample=index, reward=0.1 + index, info={"turns": 2}, timings={"rollout": 0.25}, **changes
    )
    return made._replace(prompt=made.prompt._replace(columns={"prompt": "47 + [38]?", "answer": "85"}))


def equal(one, other):
    for name, a, b in zip(one._fields, one, other, strict=True):
        if name == "prompt":
            equal(a, b)
        elif isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            np.testing.assert_array_equal(a, b, name)
        elif name == "rewards":
            np.testing.assert_equal(dict(a), dict(b))
        else:
            np.testing.assert_equal(a, b, name)


def test_samples_are_read_back_bit_for_bit(tmp_path):
    written = [
        sample(0, 0),
        sample(0, 1, advantages=np.array([0.1, 1 / 3, -2, 0], np.float32)),
        sample(
            1,
            0,
            token_rewards=np.array([0, 1, 0, 0.5], np.float32),
            supports=np.arange(8, dtype=np.int32).reshape(4, 2),
        ),
        sample(1, 1, length=0)._replace(reward=math.nan, rewards={"right": math.nan, "form": 1.0}),
    ]
    path = write_step(tmp_path, 3, written)
    for one, other in zip(read_step(tmp_path, 3), written, strict=True):
        equal(one, other)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing temporary is left
    assert recorded_steps(tmp_path) == [3]
    table = pq.read_table(tmp_path / TRAJECTORIES)  # what a person's tool sees
    assert table.column("text").to_pylist()[1] == "sample 1"
    assert table.column("rewards").to_pylist()[3][1] == ("form", 1.0)


def test_a_repeated_step_replaces_its_file(tmp_path):
    write_step(tmp_path, 1, [sample(0, 0), sample(0, 1)])
    write_step(tmp_path, 1, [sample(0, 0)])
    assert len(read_step(tmp_path, 1)) == 1
    with pytest.raises(ValueError, match="has no recorded trajectories of step 2"):
        read_step(tmp_path, 2)


def test_a_replay_returns_the_recorded_steps_in_order(tmp_path):
    steps = {1: [sample(0, 0), sample(0, 1)], 3: [sample(1, index) for index in (1, 0)]}
    for step in (3, 1):
        write_step(tmp_path, step, [t._replace(advantages=np.ones(4, np.float32)) for t in steps[step]])
    replay = Replay(tmp_path)
    for step in (1, 3):
        collected = replay({}, 0)
        for one, other in zip(collected.trajectories, steps[step], strict=True):
            equal(one, other)
        assert collected.prompts == 1 and collected.metrics["reward"] == pytest.approx(0.6)
    assert replay({}, 0) is None
    with pytest.raises(ValueError, match="has no recorded samples to replay"):
        Replay(tmp_path / "empty")


def test_the_sample_table_shows_text_without_markup():
    out = io.StringIO()
    shown = [
        sample(0, 0, advantages=np.full(4, 0.5, np.float32))._replace(text="[bold]85[/bold]" + "x" * 999),
        sample(1),
    ]
    Console(file=out, width=160).print(sample_table(7, shown, rows=1))
    text = out.getvalue()
    assert "samples of step 7" in text and "[bold]85[/bold]" in text and "47 + [38]?" in text and "0.50" in text
    assert "…" in text and "sample 0" not in text
