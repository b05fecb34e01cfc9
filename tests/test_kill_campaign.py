"""A small dose of the kill campaign: runs that are killed and resumed equal those that are not."""

import os
import random
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("kill_campaign.py")


# Recipes and numbers of processes.
DOSES = [("sft", 2), ("kto", 1), ("reward", 2), ("distill", 1), ("grpo", 1), ("ppo", 1), ("dapo", 1)]


def test_killed_runs_go_on_exactly(tmp_path):
    (recipe, processes), seed = random.choice(DOSES), random.randrange(10**6)
    arguments = {"recipes": recipe, "processes": processes, "kills": 3, "seed": seed, "folder": tmp_path}
    command = [sys.executable, str(SCRIPT), *(f"--{key}={value}" for key, value in arguments.items())]
    paths = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    row = done.stdout.splitlines()[-2]
    assert row.startswith(f"| {recipe} | {processes} |") and row.endswith("| 0 |"), done.stdout
