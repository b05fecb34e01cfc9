"""Every test runs on eight fake CPU devices, with real shardings."""

import gc
import os
import shutil
import signal
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Hundreds of small programs are compiled and each runs for milliseconds: without the optimiser and the newer fusion
# emitters they compile nine times faster.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["JAXTRAIN_TEST_XLA_FLAGS"] = COMPILE_FAST  # for the processes that tests start
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {COMPILE_FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"

# Compiled programs are kept between runs, and shared by all checkouts and by the processes that tests start.
CACHES = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxtrain-tests"
CACHE = CACHES / f"jax-{version('jax')}-{version('jaxlib')}"
MOST_CACHED = 2 << 30  # bytes; then it begins anew, since nothing else removes programs that no test compiles any more
if "PYTEST_XDIST_WORKER" not in os.environ and sum(file.stat().st_size for file in CACHES.rglob("*")) > MOST_CACHED:
    shutil.rmtree(CACHES)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# What runs cache of their data, so that no test finds what another version of the code wrote.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxtrain-tests-")

# Whoever starts the tests, nohup or a shell's background for example, may have had these ignored, which every process
# inherits.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

# Signatures of these modules are checked at run time, shapes included.
CHECKED = [
    *("jaxtrain.nn", "jaxtrain.ops", "jaxtrain.parallel", "jaxtrain.lora", "jaxtrain.objectives", "jaxtrain.roles"),
    *("jaxtrain.train.step", "jaxtrain.sample.filters", "jaxtrain.sample.decode", "jaxtrain.data.packing"),
]
install_import_hook(CHECKED, "type_checks.check")

MAPPINGS = Path("/proc/self/maps")

# Files that take a minute and more run first, the longest before the others, so that the test processes of `make test`
# end at about the same time.
LONG = [
    *("test_planner.py", "test_tpu_compile.py", "test_rl_processes.py", "test_rl.py", "test_newcomer.py"),
    *("test_rl_worlds.py", "test_processes.py", "test_compare.py", "test_hosts.py", "test_step.py"),
    *("test_rl_beside.py", "test_stages.py", "test_ray_sampler.py", "test_sft.py", "test_signals.py", "test_docs.py"),
    *("test_mixtures.py", "test_engine_families.py", "test_kill_campaign.py", "test_engine_shapes.py"),
    *("test_on_policy.py", "test_vocabulary.py", "test_local.py", "test_folder.py", "test_export.py"),
    *("test_adapters.py", "test_checkpoint.py", "test_preemption.py", "test_engine.py", "test_app.py", "test_job.py"),
    *("test_stack.py", "test_resumed_log.py", "test_server.py", "test_decoder.py", "test_context_step.py"),
]


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def preference_run(tmp_path_factory):
    """A folder with a config of recipe preference, and the log of its run `whole`."""
    import recipe_runs

    place = recipe_runs.prepare(tmp_path_factory.mktemp("preference"))
    return place, recipe_runs.train(place, "whole")


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Each compiled program has memory mappings of its own, four modules of tests about 20,000, one of all families
    alone as many as Linux lets a process have, 65,530. Processes that kept all programs died of a segmentation fault
    in the compiler. Forgetting takes a second, so it is done where there are many."""
    import jax  # reads what is set above

    yield
    if not MAPPINGS.exists() or MAPPINGS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
