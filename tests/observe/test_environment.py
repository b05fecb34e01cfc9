"""What is known of the place where a program runs, and what `jaxtrain env` shows of it."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, version

import jax
from typer.testing import CliRunner

from jaxtrain.cli import app
from jaxtrain.observe import environment


def test_versions_devices_and_variables_are_those_of_this_process(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/somewhere")
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).output)
    assert found["packages"]["jax"] == jax.__version__
    assert found["packages"]["jaxtrain"] == version("jaxtrain")
    assert found["devices"]["backend"] == "cpu" and len(found["devices"]) == 1 + jax.local_device_count()
    assert found["variables"]["HF_HOME"] == "/somewhere"
    assert found["optional packages"]["serve"] == "installed"


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    def without_uvicorn(name: str) -> str:
        if name == "uvicorn":
            raise PackageNotFoundError
        return version(name)

    monkeypatch.setattr(environment, "version", without_uvicorn)
    text = CliRunner().invoke(app, ["env"]).output
    assert "missing: uvicorn (pip install 'jaxtrain[serve]')" in text


def test_extras_of_a_missing_package_are_not_asked_for(monkeypatch):
    def without_ray(name: str):
        raise PackageNotFoundError if name == "ray" else AssertionError(name)

    found, asked = environment.version, environment.requires
    monkeypatch.setattr(environment, "version", lambda name: without_ray(name) if name == "ray" else found(name))
    monkeypatch.setattr(environment, "requires", lambda name: without_ray(name) if name == "ray" else asked(name))
    assert environment.environment()["optional packages"]["ray"] == "missing: ray (pip install 'jaxtrain[ray]')"


def test_devices_that_cannot_be_used_are_an_entry_and_no_failure(monkeypatch):
    def none():
        raise RuntimeError("the TPU is in use")

    monkeypatch.setattr(jax, "local_devices", none)
    assert environment.environment()["devices"] == {"error": "the TPU is in use"}


def test_the_commit_of_a_folder_and_whether_files_differ_from_it(tmp_path):
    assert environment.git_commit(tmp_path / "missing") == ""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert environment.git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert environment.git_commit(tmp_path) == f"{commit}, with changed files"
