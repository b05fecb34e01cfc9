"""Compiles programs for TPUs that are not there: for each line of JSON, `[NAME, ARGUMENTS...]`, prints one.

libtpu must be told what it stands on before it is loaded, and aborts the process where something is wrong: so
`test_tpu_compile.py` starts this file in a process of its own. To start it takes longer than most programs.
"""

import json
import os
import sys

os.environ.pop("XLA_FLAGS", None)  # the tests' own are for code that is run on this host
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run on a chip, so several of us may compile side by side
}

from tpu_decode import decode
from tpu_head import head
from tpu_moe import experts
from tpu_step import step

PROGRAMS = {program.__name__: program for program in (step, decode, head, experts)}

if __name__ == "__main__":
    reports: dict[str, str] = {}
    for line in sys.stdin:
        if line not in reports:  # several tests read the report of one program
            name, *arguments = json.loads(line)
            reports[line] = json.dumps(PROGRAMS[name](*arguments))
        print(reports[line], flush=True)
