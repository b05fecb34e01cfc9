"""A run's folder has one holder, and a start that is refused leaves it as it was."""

import os
import subprocess
import sys

import pytest

from jaxtrain.session.lock import LOCK, FolderInUseError, FolderLock


def test_a_second_holder_is_refused_by_name_until_the_first_releases(tmp_path):
    with (
        FolderLock(tmp_path / "run"),
        pytest.raises(FolderInUseError, match=f"in use by process {os.getpid()} on host"),
    ):
        FolderLock(tmp_path / "run")
    FolderLock(tmp_path / "run").release()


def test_a_lock_that_is_not_kept_leaves_no_trace(tmp_path):
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
    assert not (tmp_path / "a").exists()
    (tmp_path / LOCK).write_bytes(b"of an earlier run\n")
    with FolderLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_bytes() == b"of an earlier run\n"


def test_folders_that_were_written_to_stay(tmp_path):
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["file"]
    with FolderLock(tmp_path / "run") as lock:
        lock.keep()
    assert (tmp_path / "run" / LOCK).read_bytes() == b""  # kept, and names no holder


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = (
        f"from pathlib import Path; from jaxtrain.session.lock import FolderLock; FolderLock(Path({str(tmp_path)!r}));"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code} print('held', flush=True); input()"], stdin=-1, stdout=-1
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(FolderInUseError, match=f"process {process.pid} "):
        FolderLock(tmp_path)
    process.kill()
    process.communicate()
    FolderLock(tmp_path).release()
