"""Checkpoints of a run: asynchronous, atomic, restorable on any mesh; the newest few are kept.

A checkpoint is one orbax step folder with two parts:

    state    every leaf of the saved tree, under its dotted name
    record   JSON: step, data iterator state of all virtual shards, meta; shape, dtype and checksum of every leaf

Orbax detects a missing or truncated file, but not a changed byte. Checksums are computed on the devices, from the state
that is saved and again from the restored state, so they also cover the transfers and resharding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import socket
import time
import warnings
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from jaxtrain.train.agree import barrier, gather_values
from jaxtrain.train.checksums import array_checksums
from jaxtrain.train.leaves import describe, leaf_mismatches, named_leaves, raw_leaves, raw_struct, unraw
from jaxtrain.train.orbax_errors import IO_ERRORS, is_not_of_orbax, root_cause, still_runs
from jaxtrain.train.save_waits import SAVE_WAITS
from jaxtrain.types import Array

_MAX_LISTED = 5  # names in an error message
_ATTEMPTS = 3  # saves in a row that may fail
_RETRY_AFTER = 2.0  # seconds until a failed save of arrays that are still there is attempted again
_POLL_SECONDS = 0.2  # interval at which processes exchange the status of a pending save


class CheckpointError(ValueError):
    """A checkpoint could not be written or read, or is of another model."""


class Restored(NamedTuple):
    """The contents of a checkpoint."""

    step: int
    state: Any
    data_state: dict[str, Any]  # by virtual shard, of all hosts
    meta: dict[str, Any]


class _Save(NamedTuple):
    """A save that is running."""

    step: int
    parts: dict[str, Any]  # of the checkpoint: state and record


class _Progress(NamedTuple):
    """How a save goes on one process."""

    ended: bool
    problem: str  # why it failed; empty if it did not
    barriers: list[str]  # at which its threads wait for other processes


class Checkpoints:
    """The checkpoints in the folder `dir`: one every `every` steps or `minutes`, of which the newest `keep` are kept,
    and those of multiples of `keep_every` steps.

    All processes of a run must make the same calls in the same order. Restoring only reads; the remains of an
    interrupted save are removed by the next save.

    A save that fails, because a disk is full or a bucket does not answer, does not end the run: it is warned of, and
    attempted again as long as its arrays exist; if a step has donated them, `overdue` asks for a save of newer ones.
    The third failure in a row is a CheckpointError. A save that fails on one process, in orbax's
    background threads, fails on all.
    """

    def __init__(
        self, dir: str, every: int, keep: int, keep_every: int | None = None, minutes: float | None = None
    ) -> None:
        self._dir = epath.Path(dir).absolute() if "://" not in str(dir) else epath.Path(dir)
        self._every, self._keep, self._keep_every = every, keep, keep_every
        self._seconds, self._saved_at = math.inf if minutes is None else 60 * minutes, time.monotonic()
        self.kept: list[int] = []  # steps whose checkpoints are kept beside the newest
        self._writer: ocp.training.Checkpointer | None = None
        self._damaged: list[int] = []
        self._running: _Save | None = None
        self._response: Any = None  # orbax's, of the running save; None if that could not be started
        self._problem = ""  # why it could not
        self._failures = 0  # in a row
        logging.getLogger("absl").addFilter(is_not_of_orbax)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and (save := self._running) is not None:
                # The other processes do not come here with this one, so nothing can be agreed on with them.
                self._running = None
                if problem := self._problem_here():
                    self._writer = None  # it would raise the same error again, instead of the exception of the block
                    warnings.warn(self._failure(save.step, problem), RuntimeWarning, stacklevel=2)
        finally:
            self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, also a damaged one, ascending."""
        if not self._dir.exists():
            return []
        return sorted(int(path.name) for path in self._dir.iterdir() if path.name.isdigit())

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step` steps."""
        return step % self._every == 0

    def overdue(self) -> bool:
        """Whether a save is needed now: the running one has failed on this process, or `minutes` have passed since the
        last one or the start, by the clock of process 0."""
        if self._has_failed():
            return True
        return jax.process_index() == 0 and time.monotonic() - self._saved_at >= self._seconds

    def save(self, step: int, state: Any, data_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy `state`, a tree of jax.Arrays, to the host and write it in the background.

        Waits for the running save, then returns as soon as the copy is made, so that the next step may donate the
        arrays. `data_state` is this host's part, by virtual shard; `meta` is any JSON value. A step that has a
        checkpoint is not saved again. Raises CheckpointError as `wait` does.
        """
        self.wait()
        self._saved_at = time.monotonic()
        if self._is_saved(step):
            return
        leaves = named_leaves(state)
        record = {
            "step": step,
            "data_state": _merge_over_hosts(data_state),
            "meta": meta,
            "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
            "checksums": array_checksums(raw_leaves(leaves)),
        }
        self._begin(_Save(step, {"state": raw_leaves(leaves), "record": _seal(record)}))

    def _begin(self, save: _Save) -> None:
        self._running, self._problem = save, ""
        try:
            self._response = self._open().save_checkpointables_async(save.step, save.parts, force=True)
        except IO_ERRORS as error:
            self._problem = root_cause(error)

    def wait(self) -> None:
        """Block until the running save is on disk, or has failed and its arrays no longer exist, which is a warning.

        Raises CheckpointError if three saves in a row failed.
        """
        while (save := self._running) is not None:
            try:
                problem = self._problem_anywhere()
            finally:
                self._running = self._response = None
            if not problem:
                self._failures = 0
                return
            self._writer = None  # it would raise the same error again; a new one also removes incomplete files
            self._failures += 1
            failure = self._failure(save.step, problem)
            if self._failures >= _ATTEMPTS:
                raise CheckpointError(failure)
            exists = not any(leaf.is_deleted() for leaf in save.parts["state"].values())
            then = "it is attempted again" if exists else "the run goes on, and a newer step is saved"
            warnings.warn(f"{failure}; {then}", RuntimeWarning, stacklevel=2)
            if exists and not self._is_saved(save.step):  # on others, it may have failed after the last barrier
                time.sleep(_RETRY_AFTER)
                self._begin(save)

    def _is_saved(self, step: int) -> bool:
        return any(saved.step == step for saved in self._open().checkpoints)

    def _problem_anywhere(self) -> str:
        """Wait until the running save has ended on all processes. Returns why it failed on the first one to fail, with
        its host; empty if it failed on none."""
        problem = ""
        while True:
            try:
                mine = self._problem_here(timeout=_POLL_SECONDS)
            except Exception:  # any error: of a wait that was ended below
                if not problem:
                    raise
                mine = ""
            if mine and jax.process_count() > 1:
                mine = f"process {jax.process_index()} on {socket.gethostname()}: {mine}"
            progress = gather_values(_Progress(mine is not None, mine or "", SAVE_WAITS.barriers()))
            problem = problem or next((each.problem for each in progress if each.problem), "")
            if all(each.ended for each in progress):
                return problem
            if problem:
                SAVE_WAITS.end([key for each in progress for key in each.barriers])

    def _problem_here(self, timeout: float | None = None) -> str | None:
        """Wait for the end of the running save on this process. Returns why it failed; empty if it did not, and None if
        it still runs after `timeout` seconds."""
        if self._problem:
            return self._problem
        assert self._writer is not None
        try:
            # Each response has a thread with an event loop, which ends only when the result is read.
            self._response.result(timeout=timeout)
            self._writer.wait()
        except IO_ERRORS as error:
            return None if still_runs(error) else root_cause(error)
        return ""

    def _has_failed(self) -> bool:
        """Whether the running save has failed on this process. Does not wait for it."""
        if self._response is None:
            return self._running is not None
        try:
            self._response.result(timeout=0)
        except Exception as error:  # any error: raised or reported by `wait`
            return not still_runs(error)
        return False

    def close(self) -> None:
        """`wait`, and close the writer. Safe to call twice."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def restore(self, abstract: Any, partial: bool = False, step: int | None = None) -> Restored | None:
        """The newest undamaged checkpoint, or that of `step`; None if there is no checkpoint.

        `abstract` is a tree of jax.ShapeDtypeStruct (or arrays) with the shardings of the restored leaves, on any mesh.
        With `partial` it may omit leaves of the checkpoint, for example to restore only the parameters.
        A damaged checkpoint is skipped with a warning, unless it is that of `step`. Raises CheckpointError if all are
        damaged, if `step` has none, or if its leaves, shapes or dtypes differ from those of `abstract`. If only some
        processes find the damage, the others fail when orbax's barrier times out after 5 minutes.
        """
        self.wait()
        wanted = named_leaves(abstract)
        damaged: dict[int, str] = {}
        for at in reversed(self._candidates(step)):
            try:
                record = self._read_record(at)
                self._check_model(at, record["leaves"], wanted, partial)
                leaves = self._read_state(at, record, wanted)
            except _DamagedError as error:
                damaged[at] = str(error)
                continue
            if damaged:
                self._damaged = list(damaged)
                warnings.warn(f"{self._list(damaged)}; falling back to step {at}", RuntimeWarning, stacklevel=2)
            state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
            return Restored(record["step"], state, record["data_state"], record["meta"])
        if damaged:
            raise CheckpointError(
                f"no checkpoint can be read: {self._list(damaged)}. Restore the files, or start in another folder"
            )
        return None

    def read_meta(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and `meta` of the newest checkpoint with a readable record, or of that of `step`; None if there is no
        checkpoint. The state is not read. Raises CheckpointError if all are damaged, or if `step` has none.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for candidate in reversed(self._candidates(step)):
            try:
                return candidate, self._read_record(candidate)["meta"]
            except _DamagedError as error:
                damaged[candidate] = str(error)
        if damaged:
            raise CheckpointError(f"no checkpoint can be read: {self._list(damaged)}")
        return None

    def _candidates(self, step: int | None) -> list[int]:
        """All steps that have a checkpoint, or only `step`. Raises CheckpointError if `step` has none."""
        steps = self.steps()
        if step is None:
            return steps
        if step not in steps:
            found = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none at all"
            raise CheckpointError(f"{self._dir} holds no checkpoint of step {step}: {found}")
        return [step]

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            if self._damaged and jax.process_index() == 0:
                # Renamed, so that they do not count towards `keep` and their steps can be saved again.
                for step in self._damaged:
                    (self._dir / str(step)).rename(self._free_name(f"{step}.damaged"))
            barrier("checkpoints opened")
            self._damaged = []
            policies: Any = ocp.training.preservation_policies
            kept = policies.AnyPreservationPolicy([policies.LatestN(self._keep), _Kept(self.kept, self._keep_every)])
            self._writer = ocp.training.Checkpointer(
                self._dir, context=_context(), preservation_policy=kept, cleanup_tmp_directories=True
            )
        return self._writer

    def _free_name(self, name: str) -> epath.Path:
        """`name`, with a number if it exists: the checkpoint of a step may be damaged more than once."""
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
        return next(path for path in (self._dir / each for each in names) if not path.exists())

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            with _context():
                sealed = ocp.load_checkpointables(self._dir / str(step), {"record": None})["record"]
            record, intact = sealed["record"], sealed == _seal(sealed["record"])
        except IO_ERRORS as error:
            problem, intact, record = root_cause(error), False, {}
        else:
            problem = "its record was changed"
        if not all(gather_values(intact)):
            raise _DamagedError(problem)
        return record

    def _read_state(self, step: int, record: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Array]:
        target = {name: raw_struct(leaf) for name, leaf in wanted.items()}
        raw, problem = {}, ""
        try:
            with _context(partial=len(wanted) < len(record["leaves"])):
                raw = ocp.load_checkpointables(self._dir / str(step), {"state": target})["state"]
        except IO_ERRORS as error:
            problem = root_cause(error)
        if not all(gather_values(not problem)):
            raise _DamagedError(problem or "another host could not read it")
        leaves = {name: unraw(raw[name], leaf) for name, leaf in wanted.items()}
        found = array_checksums(raw_leaves(leaves))
        changed = [name for name in wanted if found[name] != record["checksums"][name]]
        if changed:
            raise _DamagedError(f"values of {', '.join(changed[:_MAX_LISTED])} were changed")
        return leaves

    def _check_model(self, step: int, saved: dict[str, Any], wanted: dict[str, Any], partial: bool) -> None:
        faults = leaf_mismatches(saved, wanted, partial)
        if faults:
            listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:_MAX_LISTED])
            more = f"\n  and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
            raise CheckpointError(f"{self._dir / str(step)} is a checkpoint of another model:\n{listed}{more}")

    def _failure(self, step: int, problem: str) -> str:
        older = [kept for kept in self.steps() if kept != step]
        kept = f"the checkpoint of step {older[-1]} is still valid" if older else "there is no older one"
        return f"could not save step {step} in {self._dir} ({kept}): {problem}"

    def _list(self, damaged: dict[int, str]) -> str:
        return "; ".join(f"{self._dir / str(step)} is damaged: {problem}" for step, problem in damaged.items())


class _Kept(NamedTuple):
    """Orbax's policy of checkpoints that are kept beside the newest."""

    steps: list[int]  # they may change
    every: int | None  # and the multiples of this

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        return [
            each.step in self.steps or (self.every is not None and each.step % self.every == 0) for each in checkpoints
        ]


class _DamagedError(Exception):
    pass


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    # Weights and moments hardly compress, and zstd would compete with the step for cores.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context.checkpointables.registry = registry
    return context


def _seal(record: dict[str, Any]) -> dict[str, Any]:
    # Converted to JSON and back, since the record that is read has lists for tuples and strings for keys.
    text = json.dumps(record, sort_keys=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": json.loads(text)}


def _merge_over_hosts(data_state: dict[str, Any]) -> dict[str, Any]:
    """The union of the hosts' dicts, on every host. Raises ValueError if two hosts have the same virtual shard."""
    merged: dict[str, Any] = {}
    for part in gather_values(data_state):
        shared = sorted(merged.keys() & part.keys())
        if shared:
            raise ValueError(f"virtual shards {', '.join(shared)} are owned by two hosts")
        merged |= part
    return merged
