"""Bounds of an objective's numbers hold in Python as they do in a config."""

from dataclasses import dataclass
from typing import Literal

import pytest
from pydantic import PositiveFloat

from jaxtrain import objectives
from jaxtrain.objectives.checked import Checked
from jaxtrain.objectives.importance import Correction
from jaxtrain.rl.algorithms import ALGORITHMS, Algorithm


@dataclass(frozen=True)
class Own(Checked):
    level: Literal["token", "sequence"] = "token"
    scale: PositiveFloat = 1
    correction: Correction | None = None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.GRPO(beta=-1), r"GRPO: beta=-1: Input should be greater than or equal to 0"),
        (lambda: objectives.GRPO(top_entropy=1.5), "GRPO: top_entropy=1.5"),
        (lambda: Own(level="tokens"), "Own: level='tokens': Input should be 'token' or 'sequence'"),
        (lambda: Own(scale="0.2"), "Own: scale='0.2': Input should be a valid number"),
        (lambda: Own(scale=-0.2), "Own: scale=-0.2"),
        (lambda: Own(correction={"cap": 2.0}), "Own: correction="),
        (lambda: objectives.GRPO(max_completion_length=0), "max_completion_length=0"),
        (lambda: objectives.SAPO(tau_pos=0.0), "SAPO: tau_pos=0.0"),
        (lambda: objectives.ClippedValue(-0.2), "ClippedValue: epsilon=-0.2"),
        (lambda: Correction(cap=0.0), "Correction: cap=0.0"),
        (lambda: Correction(cap=1.0, floor=1.5), r"floor=1.5 must not be more than cap=1.0"),
        (lambda: Algorithm(ALGORITHMS["grpo"].advantages, gamma=1.5), "Algorithm: gamma=1.5"),
    ],
)
def test_a_number_out_of_bounds_is_refused_with_its_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
