"""Ray for the tests: started once per process."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(home: Path) -> None:
    import ray

    if ray.is_initialized():
        return
    with pytest.MonkeyPatch.context() as patch:  # what its processes inherit
        patch.setenv("HOME", str(home))  # Ray writes there
        patch.setenv("RAY_gcs_server_port_wait_time_s", "120")  # a busy machine takes longer than the default
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        # Sockets lie in the folder, and their paths must be short.
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=f"/tmp/ray_{os.getpid()}")
