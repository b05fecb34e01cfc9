"""Runs with TRL and torch: `python trl_divergences.py FOLDER`, for tests/objectives/test_distill_trl.py.

TRL's GKDTrainer computes its loss, and torch the gradient by the student's logits, of the arrays in `problem.npz`.
Writes `results.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

# By name: the `beta` of TRL's generalised JSD, of which 0 and 1 are the two KL divergences, and the temperature.
CASES = {
    "forward_kl": (0.0, 1.0),
    "forward_kl, temperature 2": (0.0, 2.0),
    "reverse_kl": (1.0, 1.0),
    "reverse_kl, temperature 0.7": (1.0, 0.7),
    "jsd": (0.5, 1.0),
    "jsd, beta 0.1, temperature 2": (0.1, 2.0),
}
IGNORED = -100  # the label of a token that is not trained


def main() -> None:
    import torch
    from trl.experimental.gkd import GKDTrainer

    folder = Path(sys.argv[1])
    problem = np.load(folder / "problem.npz")
    results = {}
    for name, (beta, temperature) in CASES.items():
        student = torch.tensor(problem["student"], requires_grad=True)
        teacher, labels = torch.tensor(problem["teacher"]), torch.tensor(problem["labels"])
        loss = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
        loss.backward()
        results |= {f"{name}: loss": loss.item(), f"{name}: gradient": student.grad.numpy()}
    np.savez(folder / "results.npz", **results)


if __name__ == "__main__":
    main()
