"""Runs whose folder is a URL: in memory, and at an emulator of Google's storage, where orbax writes the checkpoints."""

import json
import shutil
import signal

import fsspec
import pytest
import recipe_runs

from jaxtrain.cli.runs import export, report, status
from jaxtrain.config import load_config
from jaxtrain.observe.run_files import HEARTBEATS
from jaxtrain.recipes.run import run
from jaxtrain.remote import RemoteError, cache_home, copied_folder
from jaxtrain.session.export import export_run
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.lock import LOCK
from jaxtrain.session.mirror import RunMirror, local_run
from jaxtrain.session.record import CHECKPOINTS, ORIGIN


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A file system with the empty bucket gs://bucket, in an emulator on this machine."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # read by the import; the emulator has none
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    gcsfs = pytest.importorskip("gcsfs")
    server = emulator.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host, port = server._api._httpd.server_address
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")  # read by gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{host}:{port}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield gcsfs.GCSFileSystem()
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()


def files(folder):
    """What a folder holds beside its checkpoints, whose files have random names, and what is not mirrored."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    others = {name: path for name, path in found.items() if not name.startswith((CHECKPOINTS, HEARTBEATS))}
    return {name: path.read_bytes() for name, path in others.items() if name not in (LOCK, ORIGIN)}


def test_the_status_and_the_report_of_a_run_at_a_url(preference_run, memory, tmp_path, monkeypatch, capsys):
    place, _ = preference_run
    shutil.copytree(place / "whole", tmp_path / "local")
    shutil.rmtree(tmp_path / "local" / HEARTBEATS)
    RunMirror("memory://runs/a", path=tmp_path / "local").push()
    read, get_file = [], type(memory).get_file

    def noted(filesystem, path, *more, **given):
        read.append(path)
        return get_file(filesystem, path, *more, **given)

    monkeypatch.setattr(type(memory), "get_file", noted)

    def shown(run, command, **given):
        command(run, **given)
        return capsys.readouterr().out

    here = json.loads(shown(str(tmp_path / "local"), status, as_json=True))
    there = json.loads(shown("memory://runs/a", status, as_json=True))
    assert there["run"] == "memory://runs/a" and there["state"] == "finished" and there["metrics"] == here["metrics"]
    assert {**there["checkpoint"], "age": 0} == {**here["checkpoint"], "age": 0} and there["checkpoint"]["age"] > 0
    by_file = json.loads(shown(f"file://{tmp_path / 'local'}", status, as_json=True))
    assert by_file["metrics"] == here["metrics"] and by_file["checkpoint"]["step"] == here["checkpoint"]["step"]

    memory.rm("/runs/a/report.html")
    assert shown(["memory://runs/a"], report) == "wrote memory://runs/a/report.html\n"
    assert b"</html>" in memory.cat("/runs/a/report.html")
    both = shown(["memory://runs/a", str(tmp_path / "local")], report, out=tmp_path / "both.html")
    assert both == f"wrote {tmp_path / 'both.html'}\n" and "local" in (tmp_path / "both.html").read_text()
    assert read and not [name for name in read if f"/{CHECKPOINTS}/" in name]
    with pytest.raises(RemoteError, match="memory://runs/none: is not the folder of a run"):
        status("memory://runs/none")


def test_a_run_at_a_url_is_resumed_and_exported_as_a_local_one(preference_run, memory, tmp_path):
    place, _ = preference_run
    whole = place / "whole"
    recipe_runs.killed_copy(whole, tmp_path / "killed", step=2)
    RunMirror("memory://runs/a", path=tmp_path / "killed").push()
    run(load_config(place / "run.yaml", ["run.dir=memory://runs/a"]))
    shutil.rmtree(cache_home() / "runs")  # what counts is at the URL
    copy = local_run("memory://runs/a")
    assert checkpoint_steps(copy) == checkpoint_steps(whole)
    assert recipe_runs.checksums(copy) == recipe_runs.checksums(whole)
    assert recipe_runs.logged(copy) == recipe_runs.logged(whole)
    assert files(copy).keys() == files(whole).keys()
    for source, out in (("memory://runs/a", "remote"), (str(whole), "local")):
        export(source, str(tmp_path / out), step=None, dtype=None, adapter=False, best=False)
    assert files(tmp_path / "remote") == files(tmp_path / "local")


def test_a_refused_start_leaves_the_url_unchanged(preference_run, memory, tmp_path):
    place, _ = preference_run
    RunMirror("memory://runs/b", path=place / "whole").push()
    before = {name: memory.cat(name) for name in memory.find("/runs/b")}
    with pytest.raises(ValueError, match="holds a run with another config"):
        run(load_config(place / "run.yaml", ["run.dir=memory://runs/b", "optimizer.learning_rate=0.5"]))
    assert {name: memory.cat(name) for name in memory.find("/runs/b")} == before


def test_only_what_changed_is_uploaded_and_what_was_removed_is_removed(memory, tmp_path):
    mirror = RunMirror("memory://runs/c", path=tmp_path / "c")
    mirror.pull()
    for name in ("a", "b", LOCK):
        (tmp_path / "c" / name).write_text(name)
    mirror.push()
    assert memory.find("/runs/c") == ["/runs/c/a", "/runs/c/b"]
    memory.pipe("/runs/c/a", b"of another process")
    (tmp_path / "c" / "b").unlink()
    (tmp_path / "c" / "d").write_text("d")
    mirror.push()
    assert memory.find("/runs/c") == ["/runs/c/a", "/runs/c/d"] and memory.cat("/runs/c/a") == b"of another process"


def test_several_processes_need_a_url_where_orbax_writes(memory):
    with pytest.raises(RemoteError, match=r"run\.dir=memory://runs/d: several processes write checkpoints to a folder"):
        RunMirror("memory://runs/d", process=1, processes=2)
    assert RunMirror("gs://a/d", 1, 2).path != RunMirror("gs://a/d", 0, 2).path


def test_orbax_writes_the_checkpoints_of_a_run_at_gs(preference_run, storage, tmp_path):
    place, _ = preference_run
    (tmp_path / "stop.py").write_text("import signal\ndef stop(session): signal.raise_signal(signal.SIGTERM)")
    stop = f"callbacks=[{{every: 3, function: {tmp_path / 'stop.py'}:stop}}]"
    outcomes = [run(load_config(place / "run.yaml", ["run.dir=gs://bucket/runs/a", *more])) for more in ([stop], [])]
    assert [each.exit_code for each in outcomes] == [128 + signal.SIGTERM, 0]
    copy = local_run("gs://bucket/runs/a")
    assert not (copy / CHECKPOINTS).exists() and checkpoint_steps(copy)[-1] == 6
    assert recipe_runs.checksums(copy) == recipe_runs.checksums(place / "whole")
    assert recipe_runs.logged(copy) == recipe_runs.logged(place / "whole")
    export_run("gs://bucket/runs/a", "gs://bucket/models/a")
    export_run(place / "whole", tmp_path / "local")
    assert files(copied_folder("gs://bucket/models/a", ["*"])).keys() >= files(tmp_path / "local").keys()
