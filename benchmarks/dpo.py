"""DPO step time on a CPU: jaxtrain, a plain PyTorch loop, TRL's DPOTrainer, Tunix's DPOTrainer.

Usage: python benchmarks/dpo.py [--rounds 7] [--steps 2] [--trl-python PYTHON] [--tunix-python PYTHON]

Uses the model of benchmarks/sft.py. A step takes one update on 8 pairs of 2 x 256 tokens, of which 128 are the prompt,
in float32, with AdamW; it includes the forward pass of the reference, which is a second model. Sides, rounds and ratios
are as in benchmarks/sft.py. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

from dpo_sides import LENGTH, PAIRS, PROMPT
from step_times import compare

GOALS = {"torch": 1.5, "trl": 2.5, "tunix": 1.5}
NAMES = {
    "jaxtrain": "jaxtrain",
    "torch": "PyTorch loop (transformers, sdpa, fused AdamW)",
    "trl": "TRL DPOTrainer",
    "tunix": "Tunix DPOTrainer",
}
TITLE = f"A DPO step on a CPU: 14.1 M parameters, {PAIRS} pairs of 2 x {LENGTH} tokens ({PROMPT} of prompt), float32"

if __name__ == "__main__":
    compare(__doc__, "dpo", TITLE, NAMES, GOALS, rounds=7)
