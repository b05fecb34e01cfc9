"""Opening a run's folder to train in it: held by one run at a time, and never continued with another config.

Nothing in the folder is written before `RunFolder.start`, so a start that is refused leaves the folder as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config import RunConfig, config_tree, dump_config
from jaxtrain.config.changes import Change, check_keys, covers, differences, input_paths
from jaxtrain.roles.tokenizer import fingerprint
from jaxtrain.session.inputs import Fingerprint, changed_file, fingerprints
from jaxtrain.session.lock import FolderLock
from jaxtrain.session.record import (
    CHANGES,
    CHECKPOINTS,
    CONFIG,
    FINISHED,
    INPUTS,
    drop_mark_of_another_process,
    effective_config,
    effective_inputs,
    recorded_changes,
    write_atomically,
)
from jaxtrain.train.checkpoint import Checkpoints

_TOKENIZER_KEYS = ("model.path", "model.tokenizer", "model.chat_template", "model.add_tokens")


class _Checked(NamedTuple):
    """What process 0 found out about the folder; plain values, which travel to the other processes as JSON."""

    inputs: dict[str, Fingerprint]
    changes: dict[str, dict[str, Any]]  # permitted ones: key -> old and new value
    exhausted_at: int | None  # the step after which the run ended because there was no more data


class RunFolder:
    """The folder of the run under way. Every process has one; process 0 writes."""

    def __init__(
        self, config: RunConfig, allow_change: Sequence[str], checked: _Checked, lock: FolderLock | None
    ) -> None:
        self.config = config
        self.path = Path(config.run.dir)
        self._allow_change = allow_change
        self._checked = checked
        self._lock = lock
        self._started = False

    def meta(self) -> dict[str, Any]:
        """What every checkpoint says of the run: the resolved config, and what the model was read from."""
        inputs = {key: files for key, files in self._checked.inputs.items() if key.startswith("model.")}
        return {"config": config_tree(self.config), "inputs": inputs}

    def permits(self, keys: Sequence[str]) -> bool:
        """Whether one of `keys` may differ from the newest checkpoint's config: now, or since an earlier start."""
        recorded = [key for change in recorded_changes(self.path) for key in change["changes"]]
        return any(covers(keys, key) for key in (*self._allow_change, *recorded))

    def check_tokenizer(self, meta: dict[str, Any], tokenizer: Any) -> None:
        """Raise ValueError where a checkpoint's `meta` names another tokenizer, unless a change is permitted."""
        if meta["tokenizer"] != fingerprint(tokenizer) and not self.permits(_TOKENIZER_KEYS):
            raise ValueError(
                f"{self.path} was trained with another tokenizer or chat template: go on with that one, choose another "
                "run.dir, or permit the change with --allow-change model.tokenizer"
            )

    def finished(self, step: int) -> bool:
        """Whether nothing is left to train after `step`, the newest checkpoint's; says so if it is."""
        if step and step >= self.config.train.steps:
            reason = f"train.steps={self.config.train.steps} and its newest checkpoint is of step {step}"
        elif step and step == self._checked.exhausted_at and not self._checked.changes:
            reason = f"its training data was exhausted after step {step}, before train.steps={self.config.train.steps}"
        else:
            return False
        if self._lock is not None:
            print(f"the run in {self.path} is finished: {reason}. Nothing was trained", flush=True)
        return True

    def start(self, step: int) -> None:
        """Training begins after `step`: write the config at step 0, or record which of its keys have changed since.

        A folder without a checkpoint holds nothing that another config could be mixed with, so its config is replaced.
        """
        self._started = True
        if self._lock is None:
            return
        self._lock.keep()
        drop_mark_of_another_process(self.path)
        if step == 0:
            if (self.path / CONFIG).exists():
                print(f"{self.path} holds no checkpoint: the run starts over, with this config", flush=True)
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

    def finish(self) -> None:
        """The run has ended by itself, after the step of its newest checkpoint. Nothing is done if it did not start."""
        steps = checkpoint_steps(self.path)
        if self._started and self._lock is not None and steps:
            exhausted = steps[-1] < self.config.train.steps
            write_atomically(self.path / FINISHED, json.dumps({"step": steps[-1], "data_exhausted": exhausted}) + "\n")


@contextmanager
def open_run(config: RunConfig, *, resume: bool = True, allow_change: Sequence[str] = ()) -> Iterator[RunFolder]:
    """Hold the folder `run.dir` and check that this config may go on in it.

    All processes of a run call it together. Process 0 holds the folder and looks into it; what it refuses, all refuse.
    `allow_change`: keys that may differ although that changes the numbers; the change is recorded.

    Raises FolderInUseError where another run holds the folder. Raises ValueError where it holds another run: one of
    another recipe, one with checkpoints whose config differs in a key that may not change, or, without `resume`, one
    with checkpoints.
    """
    check_keys(allow_change)
    folder, lock = Path(config.run.dir), None
    with ExitStack() as stack:

        def look() -> _Checked:
            nonlocal lock
            lock = stack.enter_context(FolderLock(folder))
            return _check(config, folder, resume, allow_change)

        checked = _Checked(*_from_process_0(look))
        yield RunFolder(config, allow_change, checked, lock)


def checkpoint_steps(folder: Path) -> list[int]:
    with Checkpoints(str(folder / CHECKPOINTS), 1, 1) as checkpoints:
        return checkpoints.steps()


def _check(config: RunConfig, folder: Path, resume: bool, allow_change: Sequence[str]) -> _Checked:
    steps = checkpoint_steps(folder)
    if not resume and steps:
        raise ValueError(
            f"{folder} holds checkpoints up to step {steps[-1]}: choose another run.dir, remove the folder, or go on "
            "with --resume"
        )
    inputs = fingerprints(config)
    if not (folder / CONFIG).exists():
        if steps:
            raise ValueError(
                f"{folder} holds checkpoints up to step {steps[-1]}, but no {CONFIG}, so nothing says which run they "
                "belong to: bring it back, or choose another run.dir"
            )
        return _Checked(inputs, {}, None)
    begun = effective_config(folder)
    if begun.recipe != config.recipe:
        raise ValueError(
            f"{folder} holds a run of recipe {begun.recipe} and this config is of recipe {config.recipe}: choose "
            "another run.dir"
        )
    if not steps:
        return _Checked(inputs, {}, None)
    found = _changes(begun, config, effective_inputs(folder), inputs)
    refused = [change for change in found if not covers(allow_change, change.key)]
    if refused:
        lines = "\n".join(f"  {change}" for change in refused)
        options = " ".join(f"--allow-change {change.key}" for change in refused)
        raise ValueError(
            f"{folder} holds a run that began otherwise (old -> new):\n{lines}\n"
            f"Start it with the old values, choose another run.dir, or permit and record the change: {options}"
        )
    end = json.loads((folder / FINISHED).read_text()) if (folder / FINISHED).exists() else {}
    exhausted_at = end["step"] if end.get("data_exhausted") else None
    return _Checked(inputs, {change.key: {"old": change.old, "new": change.new} for change in found}, exhausted_at)


def _changes(
    old: RunConfig, new: RunConfig, old_inputs: dict[str, Fingerprint], new_inputs: dict[str, Fingerprint]
) -> list[Change]:
    """The config's differences, and the inputs that are other files now, under the same path or another."""

    def is_same_input(change: Change) -> bool:
        if None in (change.old, change.new):
            return False
        before, now = old_inputs.get(change.key), new_inputs.get(change.key)
        return (bool(now) and before == now) or Path(change.old).resolve() == Path(change.new).resolve()

    changes = [change for change in differences(old, new) if not (change.is_input and is_same_input(change))]
    keys = [change.key for change in changes]
    for key, path in input_paths(new):
        before, now = old_inputs.get(key), new_inputs[key]
        # Files that are gone are reported by whoever reads them.
        if before and now and not covers(keys, key) and (how := changed_file(before, now)):
            changes.append(Change(key, path, f"{path}, but {how}", True))
    return changes


def _from_process_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, a plain value, on every process; its ValueError or OSError is raised on all."""
    if jax.process_count() == 1:
        return make()
    error, answer = None, {}
    if jax.process_index() == 0:
        try:
            answer = {"value": make()}
        except (ValueError, OSError) as problem:
            error, answer = problem, {"error": str(problem)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(text.size, np.int32)))
    sent = multihost_utils.broadcast_one_to_all(np.resize(text, size))
    if error is not None:
        raise error
    answer = json.loads(np.asarray(sent, np.uint8).tobytes())
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]
