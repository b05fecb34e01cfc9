"""Opens a run's folder for training. Only one run at a time uses it, and it is never resumed with another config.

Nothing is written to the folder before `RunFolder.start`, so a refused start leaves it unchanged.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain.config import RunConfig, config_tree, dump_config
from jaxtrain.config.changes import Change, check_keys, covers, differences, input_paths
from jaxtrain.data.fingerprints import tokenizer_fingerprint
from jaxtrain.observe.run_files import CHANGES, CONFIG, FINISHED, INPUTS
from jaxtrain.remote import is_url
from jaxtrain.session.inputs import Fingerprint, changed_file, input_fingerprints
from jaxtrain.session.lock import FolderLock, sees_nonce
from jaxtrain.session.mirror import RunMirror
from jaxtrain.session.record import (
    checkpoint_folder,
    effective_config,
    effective_inputs,
    recorded_changes,
    remove_quickstart_mark,
    write_atomically,
)
from jaxtrain.train.agree import from_process_0, gather_values
from jaxtrain.train.checkpoint import Checkpoints

log = logging.getLogger(__name__)

_VISIBLE_WITHIN = 10.0  # seconds within which a shared file system shows on one host what another wrote
_PACKAGES = ("jaxtrain", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers")
_TOKENIZER_KEYS = ("model.path", "model.tokenizer", "model.chat_template", "model.add_tokens")


class _Checked(NamedTuple):
    """What process 0 found in the folder: plain values, which are sent to the other processes as JSON."""

    inputs: dict[str, Fingerprint]
    changes: dict[str, dict[str, Any]]  # permitted ones: key -> old and new value
    ended_at: int | None  # the step after which the run ended by itself
    ended_because: str  # empty: that was its last step
    date: str  # today for chat templates: data.date, or the day on which the run began


class RunFolder:
    """The folder of the current run. Every process has one; only process 0 writes."""

    def __init__(
        self,
        config: RunConfig,
        allow_change: Sequence[str],
        checked: _Checked,
        lock: FolderLock | None,
        mirror: RunMirror | None = None,
    ) -> None:
        self.config = config
        self.path = mirror.path if mirror else Path(config.run.dir)
        self._mirror = mirror
        self._allow_change = allow_change
        self._checked = checked
        self._lock = lock
        self._started = False

    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, to be saved and restored."""
        section = self.config.checkpoint
        return Checkpoints(
            checkpoint_folder(self.path), section.every, section.keep, section.keep_every, section.minutes
        )

    def meta(self) -> dict[str, Any]:
        """The record in every checkpoint: the resolved config, fingerprints of the model's files, and versions."""
        inputs = {key: files for key, files in self._checked.inputs.items() if key.startswith("model.")}
        return {"config": config_tree(self.config), "inputs": inputs, "versions": _versions()}

    def permits(self, keys: Sequence[str]) -> bool:
        """Whether `--allow-change` permits one of `keys` to change, in this start or an earlier one."""
        recorded = [key for change in recorded_changes(self.path) for key in change["changes"]]
        return any(covers(keys, key) for key in (*self._allow_change, *recorded))

    def check_meta(self, meta: dict[str, Any], tokenizer: Any) -> None:
        """Compare a checkpoint's `meta` with this process: warn if it was written with other versions of packages.

        Raises ValueError if it was trained with another tokenizer, unless a change is permitted.
        """
        here = _versions()
        changes = [
            f"{name} {version} -> {here[name]}"
            for name, version in meta.get("versions", {}).items()
            if name in here and here[name] != version
        ]
        if changes and self._lock is not None:
            log.warning(
                "the checkpoint was written with other versions (%s): the resumed run may differ in rounding from one "
                "that was not interrupted",
                ", ".join(changes),
            )
        if meta["tokenizer"] != tokenizer_fingerprint(tokenizer) and not self.permits(_TOKENIZER_KEYS):
            raise ValueError(
                f"{self.path} was trained with another tokenizer or chat template: restore that one, choose another "
                "run.dir, or permit the change with --allow-change model.tokenizer"
            )

    def finished(self, step: int, steps: int, pending: bool) -> bool:
        """Whether nothing is left to do after `step`, the newest checkpoint's; prints it if so.

        `steps`: of the whole run. `pending`: whether an evaluation or a callback was missing when it was saved.
        """
        if step and step >= steps and (not pending or step == self._checked.ended_at):
            reason = f"it has {steps} steps and its newest checkpoint is of step {step}"
        elif step and step == self._checked.ended_at and self._checked.ended_because and not self._checked.changes:
            reason = f"{self._checked.ended_because} after step {step} of {steps}"
        else:
            return False
        if self._lock is not None:
            print(f"the run in {self.path} is finished: {reason}. Nothing was trained", flush=True)
        return True

    def start(self, step: int) -> None:
        """Training starts after `step`: write the config at step 0, else record the permitted changes.

        In a folder without a checkpoint the config is replaced, since nothing was trained with the old one.
        """
        self._started = True
        if self._lock is None:
            return
        self._lock.keep()
        remove_quickstart_mark(self.path)
        if step == 0:
            if (self.path / CONFIG).exists():
                print(f"{self.path} has no checkpoint: the run starts over with this config", flush=True)
            for outdated in (CHANGES, FINISHED):
                (self.path / outdated).unlink(missing_ok=True)
            write_atomically(self.path / INPUTS, json.dumps(self._checked.inputs, indent=1) + "\n")
            write_atomically(self.path / CONFIG, dump_config(self.config))
        elif self._checked.changes:
            change = {
                "step": step,
                "changes": self._checked.changes,
                "config": config_tree(self.config),
                "inputs": self._checked.inputs,
            }
            file = self.path / CHANGES
            before = file.read_text() if file.exists() else ""
            write_atomically(file, before + json.dumps(change) + "\n")
        self.publish()

    def publish(self) -> None:
        """Upload what this process has written, where `run.dir` is a URL. Raises RemoteError."""
        if self._started and self._mirror is not None:
            self._mirror.push()

    def finish(self, of_steps: int, early_end: str = "the data was exhausted") -> None:
        """The run of `of_steps` steps has ended by itself, after the step of its newest checkpoint.

        `early_end` is the reason, if that is not the last one. Nothing is done if the run did not start.
        """
        steps = checkpoint_steps(self.path)
        if self._started and self._lock is not None and steps:
            end = {"step": steps[-1]} | ({"ended_because": early_end} if steps[-1] < of_steps else {})
            write_atomically(self.path / FINISHED, json.dumps(end) + "\n")


@contextmanager
def open_run(config: RunConfig, *, resume: bool = True, allow_change: Sequence[str] = ()) -> Iterator[RunFolder]:
    """Lock the folder `run.dir` and check that it may be trained in with this config.

    All processes of a run call it together. Process 0 locks and checks the folder; its errors are raised on all.
    `allow_change`: keys that may change although that changes the numbers; the change is recorded.

    Raises FolderInUseError if another run uses the folder. Raises ValueError if the folder's run has another recipe, or
    has checkpoints and its config differs in a key that may not change, or has checkpoints and `resume` is False, or if
    `run.dir` is not the same folder on all hosts.
    """
    check_keys(allow_change, config)
    remote, processes = is_url(config.run.dir), jax.process_count()
    mirror = RunMirror(config.run.dir, jax.process_index(), processes) if remote else None
    folder, lock = mirror.path if mirror else Path(config.run.dir), None
    with ExitStack() as stack:

        def lock_and_check() -> tuple[_Checked, str]:
            nonlocal lock
            lock = stack.enter_context(FolderLock(folder))
            if mirror is not None:
                mirror.pull()
            return _check(config, folder, resume, allow_change), lock.nonce

        found, nonce = from_process_0(lock_and_check)
        if mirror is None:
            _check_same_folder(folder, nonce)
        elif lock is None:
            mirror.pull()
        checked = _Checked(*found)
        config = config.model_copy(update={"data": config.data.model_copy(update={"date": checked.date})})
        opened = RunFolder(config, allow_change, checked, lock, mirror)
        try:
            yield opened
        finally:
            opened.publish()


def _versions() -> dict[str, str]:
    """Versions of the packages that determine a run's numbers, of those that are installed with their metadata."""
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def checkpoint_steps(folder: Path) -> list[int]:
    with Checkpoints(checkpoint_folder(folder), 1, 1) as checkpoints:
        return checkpoints.steps()


def _check(config: RunConfig, folder: Path, resume: bool, allow_change: Sequence[str]) -> _Checked:
    steps = checkpoint_steps(folder)
    if not resume and steps:
        raise ValueError(
            f"{folder} holds checkpoints up to step {steps[-1]}: choose another run.dir, remove the folder, or "
            "resume with --resume"
        )
    inputs = input_fingerprints(config)
    today = config.data.date or datetime.date.today().isoformat()
    if not (folder / CONFIG).exists():
        if steps:
            raise ValueError(
                f"{folder} holds checkpoints up to step {steps[-1]}, but no {CONFIG}, so their run is unknown: "
                "restore it, or choose another run.dir"
            )
        return _Checked(inputs, {}, None, "", today)
    stored = effective_config(folder)
    if stored.recipe != config.recipe:
        raise ValueError(
            f"{folder} holds a run of recipe {stored.recipe}, but this config has recipe {config.recipe}: choose "
            "another run.dir"
        )
    if not steps:
        return _Checked(inputs, {}, None, "", today)
    found = _changes(stored, config, effective_inputs(folder), inputs)
    refused = [change for change in found if not covers(allow_change, change.key)]
    if refused:
        lines = "\n".join(f"  {change}" for change in refused)
        options = " ".join(f"--allow-change {change.key}" for change in refused)
        raise ValueError(
            f"{folder} holds a run with another config (old -> new):\n{lines}\n"
            f"Use the old values, choose another run.dir, or permit and record the change: {options}"
        )
    end = json.loads((folder / FINISHED).read_text()) if (folder / FINISHED).exists() else {}
    changes = {change.key: {"old": change.old, "new": change.new} for change in found}
    date = config.data.date or stored.data.date or today
    return _Checked(inputs, changes, end.get("step"), end.get("ended_because", ""), date)


def _changes(
    old: RunConfig, new: RunConfig, old_inputs: dict[str, Fingerprint], new_inputs: dict[str, Fingerprint]
) -> list[Change]:
    """The config's differences, and the inputs whose files have changed, under the same path or another."""

    def is_same_input(change: Change) -> bool:
        if None in (change.old, change.new):
            return False
        before, now = old_inputs.get(change.key), new_inputs.get(change.key)
        return (bool(now) and before == now) or Path(change.old).resolve() == Path(change.new).resolve()

    changes = [change for change in differences(old, new) if not (change.is_input and is_same_input(change))]
    keys = [change.key for change in changes]
    for key, path in input_paths(new):
        before, now = old_inputs.get(key), new_inputs[key]
        # Missing files are reported when they are read.
        if before and now and not covers(keys, key) and (how := changed_file(before, now)):
            changes.append(Change(key, path, f"{path}, but {how}", True))
    return changes


def _check_same_folder(folder: Path, nonce: str) -> None:
    """Raise ValueError on all processes where one of them does not see what process 0 wrote into the folder."""
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not (seen := sees_nonce(folder, nonce)) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, sees in enumerate(gather_values(seen)) if not sees]
    if blind:
        raise ValueError(
            f"run.dir={folder} is not the same folder on all hosts: the processes {', '.join(map(str, blind))} do not "
            "see what process 0 wrote there. Choose a folder on a file system that all hosts share"
        )
