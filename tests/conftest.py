"""Every test runs on eight fake CPU devices, so that shardings are real ones."""

import gc
import os
import signal
import threading
from importlib.metadata import version
from pathlib import Path

import pytest

# Hundreds of small programs are compiled and each runs for milliseconds: without the optimiser and the newer fusion
# emitters they compile nine times faster.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["JAXTRAIN_TEST_XLA_FLAGS"] = COMPILE_FAST  # for the processes that tests start
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {COMPILE_FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"

# Compiled programs are kept between runs, and shared by the processes that tests start.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / f"jax-{version('jax')}-{version('jaxlib')}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Whoever starts the tests, nohup or a shell's background for example, may have had these ignored, which every process
# inherits.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Each compiled program has memory mappings of its own, four modules of tests about 20,000, and Linux lets a
    process have 65,530. Those that kept all tests' now and then died of a segmentation fault in the compiler."""
    import jax  # reads what is set above

    yield
    jax.clear_caches()
    gc.collect()
