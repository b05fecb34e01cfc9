"""Runs with TRL and torch: `python trl_gold.py FOLDER`, for tests/objectives/test_gold.py.

The hybrid loss of TRL's GOLDTrainer, and torch's gradient by the student's distributions, of the arrays in
`problem.npz`. Writes `results.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

# By name: `beta`, `uld_hybrid_matched_weight` and `uld_hybrid_unmatched_weight`.
CASES = {
    "jsd": (0.5, None, None),
    "jsd, beta 0.2, weights": (0.2, 0.7, 0.4),
    "forward_kl": (0.0, None, None),
    "reverse_kl, weights": (1.0, 1.0, 0.5),
}


class Vocabulary:
    """The part of a tokenizer that TRL reads."""

    def __init__(self, tokens: list[str]):
        self._ids = {token: number for number, token in enumerate(tokens)}

    def get_vocab(self) -> dict[str, int]:
        return self._ids


def main() -> None:
    from types import SimpleNamespace

    import torch
    from trl.experimental.gold.gold_trainer import ULDLoss

    folder = Path(sys.argv[1])
    problem = np.load(folder / "problem.npz")
    results = {}
    for name, (beta, matched, unmatched) in CASES.items():
        config = SimpleNamespace(
            uld_crossentropy_weight=0.0,
            uld_distillation_weight=1.0,
            uld_student_temperature=1.0,
            uld_teacher_temperature=1.0,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            use_extended_uld=True,
            uld_token_merge_strategy="bayesian",
            uld_use_hybrid_loss=True,
            uld_hybrid_matched_weight=matched,
            uld_hybrid_unmatched_weight=unmatched,
            beta=beta,
        )
        vocabularies = (Vocabulary(problem[f"{side}_tokens"].tolist()) for side in ("student", "teacher"))
        loss_of = ULDLoss(config, *vocabularies)
        student = torch.tensor(problem["student"], requires_grad=True)
        further = (torch.tensor(problem[f"{side}_further"]).exp() for side in ("student", "teacher"))
        of_student, of_teacher = further
        merged = torch.softmax(student, -1) * of_student[:, None]
        loss = loss_of._compute_hybrid_uld_loss(
            merged, torch.softmax(torch.tensor(problem["teacher"]), -1) * of_teacher[:, None]
        )
        loss.backward()
        assert student.grad is not None
        results |= {f"{name}: loss": loss.item(), f"{name}: gradient": student.grad.numpy()}
    np.savez(folder / "results.npz", **results)


if __name__ == "__main__":
    main()
