"""Every test runs on eight fake CPU devices, so that shardings are real ones."""

import os

# Hundreds of small programs are compiled and each runs for milliseconds: without the optimiser and the newer fusion
# emitters they compile nine times faster.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["JAXTRAIN_TEST_XLA_FLAGS"] = COMPILE_FAST  # for the processes that tests start
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {COMPILE_FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"
