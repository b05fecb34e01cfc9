import json

from jaxtrain.observe import heartbeat
from jaxtrain.observe.heartbeat import Heartbeat, read_heartbeats


def test_a_process_tells_that_it_is_alive_and_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    steps = iter(range(10**6))
    beats = Heartbeat(tmp_path, 0, 2, lambda: {"step": next(steps)})
    (first,) = read_heartbeats(tmp_path)
    while (later := read_heartbeats(tmp_path)[0])["step"] < first["step"] + 3:
        assert later["state"] == "running" and later["processes"] == 2
    beats.stop("failed", error="no")
    (last,) = read_heartbeats(tmp_path)
    assert (last["state"], last["error"]) == ("failed", "no") and last["time"] >= first["time"]


def test_processes_that_a_run_has_no_more_are_forgotten(tmp_path):
    for process in (0, 1, 2):
        Heartbeat(tmp_path, process, 3, dict).stop("stopped")
    (tmp_path / "heartbeats" / "process_1.json").write_text("{")  # half written
    assert [beat["process"] for beat in read_heartbeats(tmp_path)] == [0, 2]
    Heartbeat(tmp_path, 0, 1, dict).stop("finished")
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["process_0.json"]


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path, caplog):
    beats = Heartbeat(tmp_path, 0, 1, dict)
    (tmp_path / "heartbeats" / "process_0.tmp").mkdir()
    for _ in range(2):
        beats.beat("running")
    beats.stop("finished")
    assert len(caplog.records) == 1 and "the heartbeat cannot be written" in caplog.text
    assert json.loads((tmp_path / "heartbeats" / "process_0.json").read_text())["state"] == "running"
