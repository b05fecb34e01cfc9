"""What a command that reads a model may be given instead: a run, an adapter, or a folder of the hub's cache."""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from pathlib import Path

from jaxtrain.config import ConfigError, MeshSection, ModelSection, parse_config
from jaxtrain.hub import local_folder
from jaxtrain.observe.run_files import CONFIG
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.remote import filesystem_of, is_url, remote_errors
from jaxtrain.roles.declare import declare
from jaxtrain.roles.role import Role
from jaxtrain.session.export import export_run, save
from jaxtrain.session.folder import checkpoint_steps
from jaxtrain.session.mirror import local_run

log = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"


def model_folder(name: str) -> str:
    """A Hugging Face folder for `name`: itself, if it is one, or the name or URL of one.

    A run is exported, at its newest checkpoint, and an adapter is merged with its base, into a folder that is removed
    when the process ends; both may be at a URL, and an adapter on the hub. Of a folder of the hub's cache it is the
    snapshot of the branch `main`, or the only one.

    Raises ValueError for a folder that is none of these, with what it holds, and what `local_run`, `local_folder`,
    `export_run` and `Role.load` raise.
    """
    folder = _local(name)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return name
    if (folder / CONFIG).is_file():
        steps = checkpoint_steps(folder)
        if not steps:
            raise ValueError(f"{name} is a run without a checkpoint yet: see `jaxtrain status {name}`")
        log.info("%s is a run: its checkpoint of step %d is exported to a temporary folder", name, steps[-1])
        out = _temporary(folder)
        export_run(folder, out)
        return str(out)
    if (folder / _ADAPTER).is_file():
        return str(_merged(folder))
    if (folder / "snapshots").is_dir():
        return str(_snapshot(folder))
    raise ValueError(f"{name} is no model: it has no config.json. {_what_is_there(folder)}")


def _local(name: str) -> Path:
    """The folder `name`, or a local copy of a run or an adapter; of a model elsewhere at most its small files."""
    if is_url(name):
        files, path = filesystem_of(name)
        with remote_errors(name):
            is_run = files.exists(f"{path.rstrip('/')}/{CONFIG}")
        if is_run:
            return local_run(name)
    folder = local_folder(name, weights=False)
    return local_folder(name) if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file() else folder


def _merged(adapter: Path) -> Path:
    base = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter / _ADAPTER} names no base_model_name_or_path, which the adapter belongs to")
    if not local_folder(base).is_dir():
        raise ValueError(
            f"{adapter} is an adapter of {base}, which is not there: write the path of that model into "
            f"base_model_name_or_path of {adapter / _ADAPTER}"
        )
    log.info("%s is an adapter of %s: both are merged into a temporary folder", adapter, base)
    tree = {"recipe": "sft", "data": {"train": {"path": "none"}}, "train": {"steps": 1}}
    model = {"path": str(base), "lora": {"path": str(adapter)}}
    try:
        section: ModelSection = parse_config(tree | {"model": model}, str(adapter)).model
    except ConfigError as error:
        raise ValueError(str(error)) from error
    if (adapter / "tokenizer_config.json").is_file():
        section = section.model_copy(update={"tokenizer": str(adapter)})
    mesh = MeshSection()
    role = Role(str(adapter), section, declare(section, make_mesh(mesh), mesh.preset), 0)
    role.load()
    out = _temporary(adapter)
    save(role, out)
    return out


def _snapshot(cache: Path) -> Path:
    """Raises ValueError where several are there and none is that of `main`."""
    snapshots = sorted(path for path in (cache / "snapshots").iterdir() if path.is_dir())
    main = cache / "refs" / "main"
    chosen = [path for path in snapshots if main.is_file() and path.name == main.read_text().strip()]
    found = chosen or snapshots
    if len(found) != 1:
        raise ValueError(
            f"{cache} holds several snapshots: name one, such as {found[0]}" if found else f"{cache} is empty"
        )
    return found[0]


def _what_is_there(folder: Path) -> str:
    """A sentence about what else could have been meant."""
    models = [path.parent for path in sorted(folder.glob("*/config.json"))]
    runs = [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
    names = ", ".join(str(path) for path in [*models, *runs])
    return f"Did you mean one of {names}?" if names else "Give a Hugging Face folder, a run, or an adapter"


def _temporary(source: Path) -> Path:
    """A path that does not exist, whose last part is that of `source`, until the process ends."""
    home = Path(tempfile.mkdtemp(prefix="jaxtrain-model-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home / source.resolve().name
