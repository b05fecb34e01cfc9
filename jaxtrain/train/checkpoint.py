"""Checkpoints of a run: asynchronous, atomic, the last few kept, restorable on any mesh.

A checkpoint is one orbax step folder with two parts:

    state    every leaf of the saved tree, under its dotted name
    record   JSON: step, data iterator state of all virtual shards, meta; shape, dtype and checksum of every leaf

Orbax notices a missing or truncated file, but not a changed byte. The checksum is taken on the devices from the state
that is saved and again from the state that was restored, so it covers everything in between, resharding included.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import warnings
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxtrain.types import Array

# What reading a damaged folder or writing to a full disk raises: orbax, tensorstore and json use builtin errors.
_IO_ERRORS = (OSError, ValueError, KeyError, TypeError)
_SHOWN = 5  # names listed in an error


class CheckpointError(ValueError):
    """A checkpoint could not be written, none can be read, or it belongs to another model."""


class Restored(NamedTuple):
    step: int
    state: Any
    data_state: dict[str, Any]  # of all virtual shards, whichever host saved them
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints under `dir`: one every `every` steps, the newest `keep` kept.

    Every process of a multi-process run makes the same calls in the same order. Restoring only reads; leftovers of a
    killed save are removed by the first save.
    """

    def __init__(self, dir: str, every: int, keep: int) -> None:
        self._dir = epath.Path(dir).absolute() if "://" not in str(dir) else epath.Path(dir)
        self._every = every
        self._keep = keep
        self._writer: ocp.training.Checkpointer | None = None
        self._damaged: list[int] = []
        self._saving: int | None = None
        self._response: Any = None  # orbax's, of the save under way
        logging.getLogger("absl").addFilter(_not_an_error_of_orbax)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending, damaged ones included."""
        if not self._dir.exists():
            return []
        return sorted(int(path.name) for path in self._dir.iterdir() if path.name.isdigit())

    def due(self, step: int) -> bool:
        """Whether the schedule wants a checkpoint after `step` steps."""
        return step % self._every == 0

    def save(self, step: int, state: Any, data_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy `state` (a tree of jax.Arrays) off the devices and write it in the background.

        Returns when the copy is made, so that the next step may donate the arrays; waits before it for the save under
        way. `data_state` is this host's part, keyed by virtual shard; `meta` is anything JSON-able. A step that is
        saved already is not saved again. Raises CheckpointError if a save failed, e.g. because the disk is full.
        """
        self.wait()
        writer = self._open()
        if any(saved.step == step for saved in writer.checkpoints):
            return
        leaves = _named_leaves(state)
        record = {
            "step": step,
            "data_state": _merge_over_hosts(data_state),
            "meta": meta,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
            "checksums": _checksums(leaves),
        }
        parts = {"state": {name: _raw(leaf) for name, leaf in leaves.items()}, "record": _seal(record)}
        self._saving = step
        try:
            self._response = writer.save_checkpointables_async(step, parts, force=True)
        except _IO_ERRORS as error:
            raise self._save_error(error) from error

    def wait(self) -> None:
        """Block until the save under way is on disk. Raises CheckpointError if it failed."""
        if self._writer is None or self._saving is None:
            return
        try:
            if self._response is not None:
                # Each response has a thread with an event loop of its own, which ends only when the result is read.
                self._response.result()
            self._writer.wait()
        except _IO_ERRORS as error:
            raise self._save_error(error) from error
        self._saving = self._response = None

    def close(self) -> None:
        """`wait`, and let go of the folder. Safe to call twice."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def restore(self, abstract: Any, partial: bool = False, step: int | None = None) -> Restored | None:
        """The newest checkpoint that is whole, or that of `step`; None where there is none at all.

        `abstract` is a tree of jax.ShapeDtypeStruct (or arrays): its shardings say where the leaves go, on whatever
        mesh. With `partial` it may lack leaves that the checkpoint has, e.g. ask for the parameters only.
        A damaged checkpoint is passed over with a warning, unless it is the one asked for. Raises CheckpointError if
        all are damaged, if `step` has none, or if the one found has other leaves, shapes or dtypes than `abstract`.
        Where only some processes meet the damage, the others notice when orbax's barrier times out after 5 minutes.
        """
        self.wait()
        wanted = _named_leaves(abstract)
        damaged: dict[int, str] = {}
        steps = self._candidates(step)
        for step in reversed(steps):
            try:
                record = self._read_record(step)
                self._check_model(step, record["leaves"], wanted, partial)
                leaves = self._read_state(step, record, wanted)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            if damaged:
                self._damaged = list(damaged)
                warnings.warn(f"{self._list(damaged)}; falling back to step {step}", RuntimeWarning, stacklevel=2)
            state = jax.tree.unflatten(jax.tree.structure(abstract), leaves.values())
            return Restored(record["step"], state, record["data_state"], record["meta"])
        if damaged:
            raise CheckpointError(
                f"no checkpoint can be read: {self._list(damaged)}. Bring the files back, or start in another folder"
            )
        return None

    def read_meta(self, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """Step and `meta` of the newest checkpoint whose record can be read, or of that of `step`; None where there is
        none at all. The state is not read. Raises CheckpointError if all are damaged, or if `step` has none.
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
        """All steps that have a checkpoint, or only `step`. Raises CheckpointError if that one has none."""
        steps = self.steps()
        if step is None:
            return steps
        if step not in steps:
            there = f"there are those of {', '.join(map(str, steps))}" if steps else "there is none at all"
            raise CheckpointError(f"{self._dir} holds no checkpoint of step {step}: {there}")
        return [step]

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            if self._damaged and jax.process_index() == 0:
                # Kept for whoever wants to look, but neither counted among `keep` nor in the way of the same step.
                for step in self._damaged:
                    (self._dir / str(step)).rename(self._free_name(f"{step}.damaged"))
            _barrier("checkpoints opened")
            self._damaged = []
            newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
            self._writer = ocp.training.Checkpointer(
                self._dir,
                context=_context(),
                preservation_policy=newest,
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _free_name(self, name: str) -> epath.Path:
        """`name`, or with a number if an earlier run has put the same step aside: it is saved again and may be
        damaged again."""
        names = itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))
        return next(path for path in (self._dir / each for each in names) if not path.exists())

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            with _context():
                sealed = ocp.load_checkpointables(self._dir / str(step), {"record": None})["record"]
            record, whole = sealed["record"], sealed == _seal(sealed["record"])
        except _IO_ERRORS as error:
            problem, whole, record = _reason(error), False, {}
        else:
            problem = "its record was changed"
        if not _all_hosts(whole):
            raise _DamagedError(problem)
        return record

    def _read_state(self, step: int, record: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Array]:
        target = {name: _raw_struct(leaf) for name, leaf in wanted.items()}
        raw, problem = {}, ""
        try:
            with _context(partial=len(wanted) < len(record["leaves"])):
                raw = ocp.load_checkpointables(self._dir / str(step), {"state": target})["state"]
        except _IO_ERRORS as error:
            problem = _reason(error)
        if not _all_hosts(not problem):
            raise _DamagedError(problem or "another host could not read it")
        leaves = {name: _unraw(raw[name], leaf) for name, leaf in wanted.items()}
        found = _checksums(leaves)
        changed = [name for name in wanted if found[name] != record["checksums"][name]]
        if changed:
            raise _DamagedError(f"values of {', '.join(changed[:_SHOWN])} were changed")
        return leaves

    def _check_model(self, step: int, saved: dict[str, Any], wanted: dict[str, Any], partial: bool) -> None:
        here = {name: _describe(leaf) for name, leaf in wanted.items()}
        faults = [f"{name} is missing in the checkpoint" for name in here.keys() - saved.keys()]
        if not partial:
            faults += [f"{name} is only in the checkpoint" for name in saved.keys() - here.keys()]
        faults += [
            f"{name} is {_show(saved[name])} in the checkpoint and {_show(here[name])} here"
            for name in here.keys() & saved.keys()
            if saved[name] != here[name]
        ]
        if faults:
            listed = "\n".join(f"  {fault}" for fault in sorted(faults)[:_SHOWN])
            more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            raise CheckpointError(f"{self._dir / str(step)} is a checkpoint of another model:\n{listed}{more}")

    def _save_error(self, error: Exception) -> CheckpointError:
        step, self._saving, self._response = self._saving, None, None
        self._writer = None  # it would raise the same error again; a new one also removes what is half written
        left = [kept for kept in self.steps() if kept != step]
        kept = f"the checkpoint of step {left[-1]} is still valid" if left else "there is no older one"
        return CheckpointError(f"could not save step {step} in {self._dir} ({kept}): {_reason(error)}")

    def _list(self, damaged: dict[int, str]) -> str:
        return "; ".join(f"{self._dir / str(step)} is damaged: {problem}" for step, problem in damaged.items())


class _DamagedError(Exception):
    pass


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    # Weights and moments hardly compress, and zstd would take cores away from the step.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = partial
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context.checkpointables.registry = registry
    return context


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves in tree order by their dotted names, e.g. `opt_state.0.mu.embed.weight`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    assert len(leaves) == len(paths), "two leaves of one name"
    return leaves


def _describe(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _show(description: list[Any]) -> str:
    shape, dtype = description
    return f"{dtype}{shape}"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Array) -> Array:
    """What is stored of a leaf: a typed PRNG key as its uint32 words, everything else as it is."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _raw_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    raw = jax.eval_shape(_raw, leaf)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=sharding)


def _unraw(raw: Array, leaf: Any) -> Array:
    if not _is_key(leaf):
        return raw
    # `key_impl` wants an array, and `leaf` may be a ShapeDtypeStruct.
    return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(jnp.empty((), leaf.dtype)))


def _checksums(leaves: dict[str, Array]) -> dict[str, int]:
    sums = _checksums_on_devices({name: _raw(leaf) for name, leaf in leaves.items()})
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksums_on_devices(leaves: dict[str, Array]) -> dict[str, Array]:
    # One program for all: as many small ones, each with a collective, can starve each other of a CPU's threads.
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(x: Array) -> Array:
    """[] uint32: axis after axis, the sum of hashes of value and index.

    Integer addition is associative, so the result does not depend on the sharding. The hash is a bijection of the
    value (lowbias32, https://nullprogram.com/blog/2018/07/31/), so a change of any one element is always seen.
    """
    bits = x.dtype.itemsize * 8
    words = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, f"uint{min(bits, 32)}")
    words = words.astype(jnp.uint32)
    while words.ndim:
        words += jax.lax.broadcasted_iota(jnp.uint32, words.shape, 0) * jnp.uint32(0x9E3779B9)
        words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
        words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
        words = jnp.sum(words ^ (words >> 16), axis=0, dtype=jnp.uint32)
    return words


def _seal(record: dict[str, Any]) -> dict[str, Any]:
    # Through JSON first: what is compared on reading has lists for tuples and strings for the keys.
    text = json.dumps(record, sort_keys=True)
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": json.loads(text)}


def _reason(error: BaseException) -> str:
    """What went wrong at the bottom, in a line. Raised again if it has nothing to do with files.

    Orbax wraps whatever happens while it reads, running out of memory and Ctrl-C included, in a KeyError.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, _IO_ERRORS):
        raise error
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:300]}"


def _not_an_error_of_orbax(record: logging.LogRecord) -> bool:
    # Every thread of a failed save logs its traceback, hundreds of lines in all, around the one error that is raised.
    return record.levelno < logging.ERROR or "/orbax/" not in record.pathname


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _all_hosts(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def _merge_over_hosts(data_state: dict[str, Any]) -> dict[str, Any]:
    """The union of the hosts' dicts, on every host. Raises ValueError if two hosts claim one virtual shard."""
    if jax.process_count() == 1:
        return data_state
    mine = np.frombuffer(json.dumps(data_state).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(mine.size))
    padded = multihost_utils.process_allgather(np.pad(mine, (0, int(sizes.max()) - mine.size)))
    merged: dict[str, Any] = {}
    for row, size in zip(padded, sizes, strict=True):
        part = json.loads(row[:size].tobytes())
        twice = sorted(merged.keys() & part.keys())
        if twice:
            raise ValueError(f"virtual shards {', '.join(twice)} are owned by two hosts")
        merged |= part
    return merged
