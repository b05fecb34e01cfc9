"""Runs commands of `jaxtrain` in turn, in a process of a job: `python in_turn.py COMMANDS`.

COMMANDS is JSON, a list of arguments for each. Prints `END` after each, and ends with the first that fails.
"""

import json
import os
import sys

END = "--- end of a command\n"

if __name__ == "__main__":
    import jax

    from jaxtrain.cli import main

    if address := os.environ.pop("JAX_COORDINATOR_ADDRESS", None):  # joined once: the commands find no other job
        jax.config.update("jax_enable_preemption_service", False)
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
