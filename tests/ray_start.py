"""Ray for the tests: started once per process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_HOMES: list[Path] = []


def start(home: Path) -> None:
    import ray

    if ray.is_initialized():
        return
    _HOMES.append(home)
    with pytest.MonkeyPatch.context() as patch:  # what its processes inherit
        patch.setenv("HOME", str(home))  # Ray writes there
        patch.setenv("RAY_gcs_server_port_wait_time_s", "120")  # a busy machine takes longer than the default
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        flags = f"--xla_force_host_platform_device_count=2 {os.environ['JAXTRAIN_TEST_XLA_FLAGS']}"
        patch.setenv("XLA_FLAGS", flags)  # a worker splits its model over two devices
        # Sockets lie in the folder, and their paths must be short.
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/ray_{os.getpid()}")


@contextmanager
def shared(home: Path) -> Iterator[None]:
    """Processes that are started within join the cluster of this process."""
    import ray

    start(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        patch.setenv("HOME", str(_HOMES[-1]))  # of the cluster's token
        yield
