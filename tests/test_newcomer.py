"""Every command in a fresh environment with the installed wheel and no clone."""

import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from jaxtrain.cli.app import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "newcomer.sh"
NETWORK = {"push"}  # talks to the hub; see tests/session/test_model_card.py


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The bin folder of an environment with jaxtrain from its wheel, and its dependencies from this environment."""
    folder = tmp_path_factory.mktemp("newcomer")
    build = ["-q", "egg_info", "-e", folder, "build", "-b", folder / "build", "bdist_wheel", "-d", folder]
    quietly = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([sys.executable, "setup.py", *build], cwd=ROOT, stderr=subprocess.DEVNULL, **quietly)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], **quietly)
    python = folder / "env" / "bin" / "python"
    packages = next((folder / "env" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, "--no-index", wheel], **quietly)
    return python.parent


def test_every_command_works(environment, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"PATH": f"{environment}:{os.environ['PATH']}", "PORT": port}
    given |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", SCRIPT], cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    where = [environment / "python", "-c", "import jaxtrain; print(jaxtrain.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(environment.parent))


def test_the_script_has_every_command():
    tried = set(re.findall(r"(?:^|\| )jaxtrain ([a-z][a-z-]*)", SCRIPT.read_text(), re.MULTILINE))
    assert {command.name for command in app.registered_commands} == tried | NETWORK
