"""Names on the Hugging Face hub and URLs where a folder is expected: `owner/name`, `owner/name@revision`, `s3://...`.

Files of the hub come from the local cache of `huggingface_hub` or are downloaded into it; `HF_HOME`, `HF_TOKEN` and
`HF_HUB_OFFLINE` are respected. Those of a URL are copied into our own cache (`remote.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

from jaxtrain.remote import copied_folder, is_url

RepoKind = Literal["model", "dataset"]

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)


class HubError(ValueError):
    """What was named is not in the cache and could not be fetched. The message says how to download it."""


def local_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder `name`, or a local copy of the folder at a URL; where there is none and it can be a model's name on
    the hub, that model's snapshot.

    A name whose first part is a local folder is taken for a path. `weights`: whether the tensors are needed too. Raises
    HubError where the hub has to be asked and cannot be, or has no such model, and RemoteError for a URL.
    """
    text = str(name).removeprefix("file://")
    if is_url(text):
        return _copy(text, weights)
    path = Path(text)
    if path.exists() or not _NAME.fullmatch(text) or path.parent.is_dir():
        return path
    return _model_snapshot(text, weights)


@lru_cache
def _copy(url: str, weights: bool) -> Path:
    return copied_folder(url, (*_TEXTS, *_WEIGHTS) if weights else _TEXTS)


@lru_cache
def _model_snapshot(name: str, weights: bool) -> Path:
    return snapshot(name, "model", (*_TEXTS, *_WEIGHTS) if weights else _TEXTS)


def is_hub_name(name: str) -> bool:
    """Whether `name` is `owner/name` or `owner/name@revision`, and no local folder."""
    return bool(_NAME.fullmatch(name)) and not Path(name).exists()


def upload(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload a model's folder as `owner/name`, which is created where it is missing; the URL of the model's page.

    Raises HubError for a name that is none, and where the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    repository, revision = split_revision(name)
    if revision is not None:
        raise HubError(f"{name}: a model is uploaded without a revision, to {repository}")
    api = HfApi()
    try:
        page = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except _client_errors() as error:
        reason = str(error).strip().partition("\n")[0]
        raise HubError(
            f"{name} could not be uploaded ({reason}). Log in with `hf auth login`, or set HF_TOKEN to a token that "
            "can write"
        ) from error
    return str(page)


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> the two parts. Raises HubError for what is not a name of the hub."""
    if not _NAME.fullmatch(name):
        raise HubError(f"{name!r} is not a name on the hub: it must be owner/name or owner/name@revision")
    repository, _, revision = name.partition("@")
    return repository, revision or None


def snapshot(name: str, kind: RepoKind, patterns: Sequence[str]) -> Path:
    """The folder in the cache with the files of a repository that match `patterns`. Raises HubError."""
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    with _errors_of(name, kind):
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)))


def list_files(name: str, kind: RepoKind) -> list[str]:
    """The files of a repository; those of its snapshot in the cache where the hub cannot be asked. Raises HubError."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repository, revision = split_revision(name)
    with _errors_of(name, kind):
        try:
            api = HfApi()
            info = (api.model_info if kind == "model" else api.dataset_info)(repository, revision=revision)
            return sorted(file.rfilename for file in info.siblings or [])
        except _client_errors() as error:
            try:
                found = snapshot_download(repository, repo_type=kind, revision=revision, local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from None
        root = Path(found)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@contextmanager
def _errors_of(name: str, kind: RepoKind) -> Iterator[None]:
    """What `huggingface_hub` raises becomes a HubError that says how to download what is missing."""
    try:
        yield
    except _client_errors() as error:
        raise HubError(missing(name, kind, str(error).strip().partition("\n")[0])) from error


def missing(name: str, kind: RepoKind, reason: str) -> str:
    """That `name` is not in the cache, why it was not fetched, and the command that downloads it."""
    from huggingface_hub import constants

    repository, command = split_revision(name)[0], download_command(name, kind)
    return (
        f"{name}: there is no such folder, and the {kind} of that name is not in the cache {constants.HF_HUB_CACHE} "
        f"and could not be fetched from the hub ({reason}). Run `{command}` where there is a network, and bring the "
        f"folder {kind}s--{repository.replace('/', '--')} that it writes into its cache into this one"
    )


def download_command(name: str, kind: RepoKind) -> str:
    """What brings a repository into the cache."""
    repository, _, revision = name.partition("@")
    command = f"hf download {repository}" + ("" if kind == "model" else f" --repo-type {kind}")
    return command + (f" --revision {revision}" if revision else "")


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def with_owner(name: str, kind: RepoKind) -> str:
    """The full name of a repository: the hub knows whose `gsm8k` is. Raises HubError where it cannot say."""
    from huggingface_hub import HfApi, constants

    if "/" in name.partition("@")[0]:
        return name
    short, at, revision = name.partition("@")
    try:
        api = HfApi()
        return (api.model_info if kind == "model" else api.dataset_info)(short).id + at + revision
    except _client_errors() as error:
        cached = sorted(path.name for path in Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*--{short}"))
        names = [each.removeprefix(f"{kind}s--").replace("--", "/") + at + revision for each in cached]
        held = f"; the cache has {' and '.join(names)}" if names else ""
        reason = str(error).strip().partition("\n")[0]
        raise HubError(
            f"{name}: the hub did not say whose {kind} this is ({reason}): write it as owner/{name}{held}"
        ) from error


def _client_errors() -> tuple[type[Exception], ...]:
    """What `huggingface_hub` raises without a connection or a file; HfHubHTTPError has the base of its HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)
