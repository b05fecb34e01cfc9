import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxtrain.observe.metrics import MetricLog


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def log_steps(run, steps, resumed_from=None, value=0.0):
    with MetricLog(run, tensorboard=False, resumed_from=resumed_from) as log:
        for step in steps:
            log.log(step, {"loss": value})
            log.log(step, {"eval_loss": value + 1})


def test_one_object_per_line_step_first(tmp_path):
    log_steps(tmp_path, [1, 2], value=0.5)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[0] == '{"step": 1, "loss": 0.5}'
    assert lines(tmp_path)[1] == {"step": 1, "eval_loss": 1.5}


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    log.log(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    log.close()


def test_a_resumed_run_leaves_no_line_of_the_steps_it_takes_again(tmp_path):
    log_steps(tmp_path, range(1, 8))
    log_steps(tmp_path, range(5, 9), resumed_from=4, value=10.0)
    assert [line["step"] for line in lines(tmp_path)] == [step for step in range(1, 9) for _ in range(2)]
    assert [line["loss"] for line in lines(tmp_path) if "loss" in line] == [0.0] * 4 + [10.0] * 4


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    log_steps(tmp_path, range(4))
    log_steps(tmp_path, [0])
    assert [line["step"] for line in lines(tmp_path)] == [0, 0]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    log_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    log_steps(tmp_path, [3], resumed_from=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 1, 2, 2, 3, 3]


def test_every_line_is_strict_json_whatever_the_loss(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "mfu": 0.5})

    def no_constants(name):
        pytest.fail(f"{name} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=no_constants) == {"step": 1, "loss": None, "grad_norm": None, "mfu": 0.5}


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricLog(tmp_path, tensorboard=True) as log:
        log.log(7, {"loss": 2.5})
        log.log(7, {"eval_loss": 3.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = {(v.tag, event.step, v.simple_value) for event in events(path) for v in event.summary.value}
    assert scalars == {("loss", 7, 2.5), ("eval_loss", 7, 3.5)}


def test_tensorboard_is_told_which_steps_come_again(tmp_path):
    MetricLog(tmp_path, tensorboard=True, resumed_from=4).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    starts = [event.step for event in events(path) if event.session_log.status == event.session_log.START]
    assert starts == [5]


def test_an_evaluation_that_comes_again_is_dropped(tmp_path):
    """And TensorBoard, which can only drop whole steps, gets the rest of its step again."""
    with MetricLog(tmp_path, tensorboard=True) as log:
        log.log(4, {"loss": float("nan"), "lr": 0.5})
        log.log(4, {"eval_loss": 1.0})
    with MetricLog(tmp_path, tensorboard=True, resumed_from=4, evaluated=False) as log:
        log.log(4, {"eval_loss": 1.0})
    assert lines(tmp_path) == [{"step": 4, "loss": None, "lr": 0.5}, {"step": 4, "eval_loss": 1.0}]
    again = events(max((tmp_path / "tensorboard").iterdir()))
    assert [event.step for event in again if event.session_log.status == event.session_log.START] == [4]
    assert [value.tag for event in again for value in event.summary.value] == ["loss", "lr", "eval_loss"]


def events(path):
    """Records of an event file: length uint64, its crc, the message, its crc."""
    content, found = path.read_bytes(), []
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        event = Event()
        event.ParseFromString(content[12 : 12 + size])
        found.append(event)
        content = content[16 + size :]
    return found
