import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.train import checkpoint
from jaxtrain.train.checkpoint import CheckpointError, Checkpoints
from jaxtrain.types import TrainState

DATA = {str(shard): {"source": shard, "open_bins": [[1, 2], []]} for shard in range(8)}
META = {"model": "tiny", "tokenizer": "abc", "config": {"train": {"steps": 10}}}


def make_state(devices: int = 8, width: int = 512, seed: int = 0, typed_key: bool = True) -> TrainState:
    mesh = jax.make_mesh((devices,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    rows, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": {"weight": jax.random.normal(keys[0], (24, width))},
        "layers": {"up_proj": {"kernel": jax.random.normal(keys[1], (8, width, 3)).astype(jnp.bfloat16)}},
    }
    params = jax.device_put(params, rows)
    moments = optax.adamw(1e-3).init(params)
    moments = jax.tree.map(lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, everywhere), moments)
    key = keys[2] if typed_key else jax.random.key_data(keys[2])
    zero, key = jax.device_put((jnp.int32(0), key), everywhere)
    return TrainState(zero, params, moments, key, zero, zero)


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(left, right):
    """Equal bit for bit, and of one structure."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(folder, steps, state=None, keep=5):
    with Checkpoints(folder, every=1, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(seed=step) if state is None else state, DATA, META)
    return checkpoints


@pytest.mark.parametrize("typed_key", [True, False])
def test_restores_bit_equal_onto_any_number_of_devices(tmp_path, typed_key):
    state = make_state(8, typed_key=typed_key)
    save_steps(tmp_path, [3], state)
    for devices in (8, 4, 1):
        target = abstract(make_state(devices, seed=1, typed_key=typed_key))
        restored = Checkpoints(tmp_path, 1, 1).restore(target)
        assert restored is not None
        assert_same(restored.state, state)
        for leaf, wanted in zip(jax.tree.leaves(restored.state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert (restored.step, restored.data_state, restored.meta) == (3, DATA, META)


def test_a_restored_key_draws_the_same_numbers(tmp_path):
    state = make_state()
    save_steps(tmp_path, [1], state)
    restored = Checkpoints(tmp_path, 1, 1).restore(abstract(state))
    assert restored is not None
    np.testing.assert_array_equal(jax.random.normal(restored.state.key, 4), jax.random.normal(state.key, 4))


def test_an_empty_folder_restores_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none", 1, 1).restore(abstract(make_state())) is None


def test_arrays_may_be_given_up_right_after_save(tmp_path):
    state = make_state(width=4096)
    before = jax.tree.map(lambda leaf: np.array(leaf), state._replace(key=jax.random.key_data(state.key)))
    with Checkpoints(tmp_path, 1, 1) as checkpoints:
        checkpoints.save(1, state, DATA, META)
        # A donating step would do no more, and less where something still looks at the buffers: it copies them then.
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    restored = Checkpoints(tmp_path, 1, 1).restore(abstract(make_state(width=4096)))
    assert restored is not None
    assert_same(restored.state._replace(key=jax.random.key_data(restored.state.key)), before)


def test_keeps_the_newest(tmp_path):
    assert save_steps(tmp_path, [1, 2, 3, 4], keep=2).steps() == [3, 4]


def test_saving_a_step_twice_changes_nothing(tmp_path):
    state = make_state(seed=1)
    save_steps(tmp_path, [1], state)
    save_steps(tmp_path, [1], make_state(seed=2))
    restored = Checkpoints(tmp_path, 1, 1).restore(abstract(state))
    assert restored is not None
    assert_same(restored.state, state)


def test_due_every_n_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, every=3, keep=1)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]


def test_parameters_alone_can_be_restored(tmp_path):
    state = make_state()
    save_steps(tmp_path, [1], state)
    only = TrainState(*[{}] * len(TrainState._fields))._replace(params=abstract(state).params)
    with pytest.raises(CheckpointError, match=r"opt_state.* is only in the checkpoint"):
        Checkpoints(tmp_path, 1, 1).restore(only)
    restored = Checkpoints(tmp_path, 1, 1).restore(only, partial=True)
    assert restored is not None
    assert_same(restored.state.params, state.params)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "values cut off": lambda step: cut(largest(step / "state" / "ocdbt.process_0" / "d")),
    "one bit of a value flipped": lambda step: flip(largest(step / "state" / "ocdbt.process_0" / "d")),
    "values gone": lambda step: largest(step / "state" / "ocdbt.process_0" / "d").unlink(),
    "index flipped": lambda step: flip(step / "state" / "manifest.ocdbt"),
    "index gone": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "record cut off": lambda step: cut(largest(step / "record")),
    "one bit of the record flipped": lambda step: flip(largest(step / "record")),
    "record gone": lambda step: shutil.rmtree(step / "record"),
    "state gone": lambda step: shutil.rmtree(step / "state"),
    "everything gone": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save_steps(folder, [4, 8])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_from_a_damaged_checkpoint(tmp_path, two_steps, damage):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "8")
    with pytest.warns(RuntimeWarning, match=rf"{re.escape(str(tmp_path / '8'))} is damaged: .*falling back to step 4"):
        restored = Checkpoints(tmp_path, 1, 2).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 4
    assert_same(restored.state, make_state(seed=4))


def test_an_undamaged_checkpoint_restores_without_a_warning(two_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        restored = Checkpoints(two_steps, 1, 2).restore(abstract(make_state()))
    assert restored is not None
    assert restored.step == 8


def test_an_older_checkpoint_can_be_asked_for(two_steps):
    restored = Checkpoints(two_steps, 1, 2).restore(abstract(make_state()), step=4)
    assert restored is not None
    assert restored.step == 4
    assert_same(restored.state, make_state(seed=4))


def test_what_was_asked_for_is_never_replaced_by_another(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of step 5: there are those of 4, 8"):
        Checkpoints(tmp_path, 1, 2).restore(abstract(make_state()), step=5)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of step 5: there is none at all"):
        Checkpoints(tmp_path / "none", 1, 2).restore(abstract(make_state()), step=5)
    cut(largest(tmp_path / "8"))
    with pytest.raises(CheckpointError, match=r"8 is damaged"):
        Checkpoints(tmp_path, 1, 2).restore(abstract(make_state()), step=8)


def test_never_starts_afresh_over_damaged_checkpoints(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    cut(largest(tmp_path / "4"))
    cut(largest(tmp_path / "8" / "record"))
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be read: .*8 is damaged.*4 is damaged"):
        Checkpoints(tmp_path, 1, 2).restore(abstract(make_state()))


def test_a_run_that_fell_back_saves_the_damaged_step_again(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    cut(largest(tmp_path / "8"))
    with Checkpoints(tmp_path, 1, 2) as checkpoints, pytest.warns(RuntimeWarning, match="falling back"):
        restored = checkpoints.restore(abstract(make_state()))
        assert restored is not None
        checkpoints.save(8, restored.state, DATA, META)
    assert checkpoints.steps() == [4, 8]
    assert (tmp_path / "8.damaged").is_dir()
    again = Checkpoints(tmp_path, 1, 2).restore(abstract(make_state()))
    assert again is not None
    assert again.step == 8
    assert_same(again.state, make_state(seed=4))


def test_a_step_that_is_damaged_again_is_put_aside_again(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for times in range(1, 4):
        cut(largest(tmp_path / "8"))
        with Checkpoints(tmp_path, 1, 2) as checkpoints, pytest.warns(RuntimeWarning, match="falling back to step 4"):
            restored = checkpoints.restore(abstract(make_state()))
            assert restored is not None
            checkpoints.save(8, restored.state, DATA, META)
        assert checkpoints.steps() == [4, 8]
        assert len(list(tmp_path.glob("8.damaged*"))) == times


def test_saves_leave_no_threads_and_no_descriptors_behind(tmp_path):
    state = {"w": jnp.zeros(4)}
    with Checkpoints(tmp_path, every=1, keep=2) as checkpoints:
        counts = []
        for step in range(1, 61):
            checkpoints.save(step, state, {}, {})
            if step in (20, 60):
                checkpoints.wait()
                counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert counts[0] == counts[1]


def test_a_checkpoint_of_another_model_is_an_error_that_names_the_parameter(two_steps):
    wider, other = abstract(make_state(width=1024)), abstract(make_state())
    with pytest.raises(
        CheckpointError, match=r"params\.embed\.weight is float32\[24, 512\] .* float32\[24, 1024\] here"
    ):
        Checkpoints(two_steps, 1, 2).restore(wider)
    other.params["embed"]["bias"] = other.params["embed"].pop("weight")
    with pytest.raises(CheckpointError) as error:
        Checkpoints(two_steps, 1, 2).restore(other)
    assert "params.embed.bias is missing in the checkpoint" in str(error.value)
    assert "params.embed.weight is only in the checkpoint" in str(error.value)


def test_another_dtype_is_an_error(two_steps):
    target = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.float16) if leaf.dtype == jnp.bfloat16 else leaf, abstract(make_state())
    )
    with pytest.raises(CheckpointError, match=r"up_proj\.kernel is bfloat16\[8, 512, 3\] .* float16\[8, 512, 3\] here"):
        Checkpoints(two_steps, 1, 2).restore(target)


PRELUDE = """
import sys, jax, jax.numpy as jnp
from jaxtrain.train import checkpoint
from jaxtrain.train import checkpoint
from jaxtrain.train.checkpoint import CheckpointError, Checkpoints
def big(step):
    return {"w": jnp.full((16, 1024, 1024), step, jnp.float32)}
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen) -> str:
    return process.communicate(timeout=120)[0]


def test_killed_in_mid_save_the_older_checkpoint_is_valid(tmp_path):
    code = """
    with Checkpoints(sys.argv[1], every=1, keep=1) as checkpoints:
        for step in range(1, 1000):
            checkpoints.save(step, big(step), {}, {})
    """
    process = spawn(code, tmp_path)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "1").exists() and any("tmp" in path.name for path in tmp_path.iterdir())):
        assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    half_written = [path for path in tmp_path.iterdir() if not path.name.isdigit()]
    assert half_written
    checkpoints = Checkpoints(tmp_path, 1, 1)
    target = {"w": jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32)}
    restored = checkpoints.restore(target)
    assert restored is not None
    assert restored.step == checkpoints.steps()[-1]
    assert (restored.state["w"] == restored.step).all()
    with checkpoints:
        checkpoints.save(restored.step + 1, {"w": jnp.zeros(())}, {}, {})
    assert not any(path.exists() for path in half_written)


def small_disk(folder: Path, megabytes: int):
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if not mounted or mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted and mounted.stderr.strip()}")


@pytest.mark.filterwarnings("ignore:could not save step 2")
def test_a_full_disk_is_an_error_and_the_older_checkpoint_is_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_RETRY_AFTER", 0.0)
    small_disk(tmp_path, 3)
    try:
        state, small = {"w": jnp.arange(500_000.0)}, {"w": jnp.zeros(())}
        checkpoints = Checkpoints(tmp_path, every=1, keep=3)
        checkpoints.save(1, state, DATA, META)
        with pytest.raises(CheckpointError, match=r"could not save step 2 .*step 1 is still valid.*No space left"):
            checkpoints.save(2, state, DATA, META)
            checkpoints.wait()
        restored = Checkpoints(tmp_path, 1, 3).restore(abstract(state))
        assert restored is not None
        assert restored.step == 1
        assert_same(restored.state, state)
        checkpoints.save(3, small, DATA, META)  # what was half written is gone, and there is room again
        checkpoints.close()
        assert checkpoints.steps() == [1, 3]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_size_limit_is_an_error_and_the_older_checkpoint_is_valid(tmp_path):
    code = """
    import resource, signal
    import warnings
    from jaxtrain.observe.logs import log_to_stderr
    warnings.simplefilter("ignore", RuntimeWarning)  # of the two attempts before
    log_to_stderr()  # as in the command, before absl has made its logger
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoints = Checkpoints(sys.argv[1], every=1, keep=3)
    checkpoints.save(1, {"w": jnp.ones(1000)}, {}, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        checkpoints.save(2, {"w": jnp.ones(1_000_000)}, {}, {})
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
    """
    said = output(spawn(code, tmp_path))
    assert re.search(r"could not save step 2 .*step 1 is still valid.*File too large", said), said
    assert len(said.splitlines()) == 1, said
    restored = Checkpoints(tmp_path, 1, 3).restore({"w": jax.ShapeDtypeStruct((1000,), jnp.float32)})
    assert restored is not None
    assert restored.step == 1


def test_kept_steps_stay_beside_the_newest(tmp_path):
    state = {"x": jax.numpy.arange(3.0)}
    with Checkpoints(str(tmp_path), 1, 1) as checkpoints:
        for step in range(1, 6):
            checkpoints.kept[:] = [2] if step < 4 else [4]
            checkpoints.save(step, state, {"0": {}}, {})
            checkpoints.wait()
            assert checkpoints.steps() == {1: [1], 2: [2], 3: [2, 3], 4: [4], 5: [4, 5]}[step]


def test_multiples_of_keep_every_stay_beside_the_newest(tmp_path):
    with Checkpoints(str(tmp_path), 1, 1, keep_every=3) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, {"x": jax.numpy.arange(3.0)}, {"0": {}}, {})
            checkpoints.wait()
            assert checkpoints.steps() == {1: [1], 2: [2], 3: [3], 4: [3, 4], 5: [3, 5]}[step]
