"""GRPO step time on a CPU: jaxtrain, a plain PyTorch loop, TRL's GRPOTrainer, Tunix's GRPOLearner.

Usage: python benchmarks/grpo.py [--rounds 3] [--steps 2] [--trl-python PYTHON] [--tunix-python PYTHON]

Uses the model of benchmarks/sft.py. A step generates 4 samples of 64 tokens for each of 8 prompts of 64 tokens, and
takes one update on the 32 samples, in float32, with AdamW and without a reference. Sides, rounds and ratios are as in
benchmarks/sft.py. Writes its section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

from grpo_sides import NEW, PROMPT, PROMPTS, SAMPLES
from step_times import compare

GOALS = {"torch": 1.3, "trl": 2.0, "tunix": 2.0}
NAMES = {
    "jaxtrain": "jaxtrain",
    "torch": "PyTorch loop (transformers' generate, sdpa, fused AdamW)",
    "trl": "TRL GRPOTrainer",
    "tunix": "Tunix GRPOLearner",
}
TITLE = f"A GRPO step on a CPU: 14.1 M parameters, {PROMPTS} prompts x {SAMPLES}, {PROMPT} + {NEW} tokens, float32"

if __name__ == "__main__":
    compare(__doc__, "grpo", TITLE, NAMES, GOALS, rounds=3)
