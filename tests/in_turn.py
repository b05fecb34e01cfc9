"""Runs commands of `jaxtrain` in turn, in a process of a job: `python in_turn.py COMMANDS`.

COMMANDS is JSON, a list of arguments for each. Prints `END` after each, and ends with the first that fails.
"""

import json
import os
import platform
import sys

END = "--- end of a command\n"


def compile_once() -> None:
    """Programs of all processes are compiled by the first alone, which sends them to the others.

    On CPUs the key of a program in JAX's cache contains the devices of the process itself, so the others would neither
    wait for the program of the first nor ever find it in the cache. Programs hold for the processor of one machine.
    A JAX that computes its keys elsewhere compiles in each process.
    """
    import jax
    from jax._src import cache_key

    if hasattr(cache_key, "_hash_accelerator_config"):
        cache_key._hash_accelerator_config = lambda key, devices: key.update(platform.node().encode())
        jax.config.update("jax_share_binary_between_hosts", True)


if __name__ == "__main__":
    import jax

    from jaxtrain.cli import main

    if address := os.environ.pop("JAX_COORDINATOR_ADDRESS", None):  # joined once: the commands find no other job
        jax.config.update("jax_enable_preemption_service", False)
        compile_once()
        count, rank = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(address, num_processes=count, process_id=rank)
    for arguments in json.loads(sys.argv[1]):
        sys.argv[1:] = arguments
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise
        print(END, end="", flush=True)
