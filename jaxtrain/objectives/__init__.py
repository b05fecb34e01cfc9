"""Training objectives. Each is a frozen dataclass of numbers that is called with scores: see `Objective`."""

from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain.objectives.distill import Distill
    from jaxtrain.objectives.gold import GOLD
    from jaxtrain.objectives.kto import KTO
    from jaxtrain.objectives.objective import (
        Correct,
        Divergence,
        Entropy,
        HybridDistance,
        Logp,
        Objective,
        Reward,
        TopLogps,
        Value,
        weighted_mean,
    )
    from jaxtrain.objectives.policies import (
        CISPO,
        DAPO,
        GRPO,
        GSPO,
        PPO,
        RLOO,
        SAPO,
        VESPO,
        ClippedPolicy,
        DrGRPO,
        ReinforcePlusPlus,
    )
    from jaxtrain.objectives.policy import PolicyObjective
    from jaxtrain.objectives.preference import CPO, DPO, ORPO, PreferenceObjective, SimPO
    from jaxtrain.objectives.reward import BradleyTerry, PointwiseReward
    from jaxtrain.objectives.segments import bundle_sums, segment_means, segment_sums
    from jaxtrain.objectives.sft import SFT
    from jaxtrain.objectives.uld import ULD
    from jaxtrain.objectives.value import ClippedValue
    from jaxtrain.types import Batch, Example, Max, Mean, Min, Norm, Scores

_WHERE = {
    "Objective": "jaxtrain.objectives.objective:Objective",
    "Logp": "jaxtrain.objectives.objective:Logp",
    "Entropy": "jaxtrain.objectives.objective:Entropy",
    "Correct": "jaxtrain.objectives.objective:Correct",
    "Value": "jaxtrain.objectives.objective:Value",
    "Divergence": "jaxtrain.objectives.objective:Divergence",
    "Distill": "jaxtrain.objectives.distill:Distill",
    "TopLogps": "jaxtrain.objectives.objective:TopLogps",
    "HybridDistance": "jaxtrain.objectives.objective:HybridDistance",
    "GOLD": "jaxtrain.objectives.gold:GOLD",
    "ULD": "jaxtrain.objectives.uld:ULD",
    "Reward": "jaxtrain.objectives.objective:Reward",
    "PreferenceObjective": "jaxtrain.objectives.preference:PreferenceObjective",
    "DPO": "jaxtrain.objectives.preference:DPO",
    "SimPO": "jaxtrain.objectives.preference:SimPO",
    "CPO": "jaxtrain.objectives.preference:CPO",
    "ORPO": "jaxtrain.objectives.preference:ORPO",
    "KTO": "jaxtrain.objectives.kto:KTO",
    "BradleyTerry": "jaxtrain.objectives.reward:BradleyTerry",
    "PointwiseReward": "jaxtrain.objectives.reward:PointwiseReward",
    "SFT": "jaxtrain.objectives.sft:SFT",
    "ClippedPolicy": "jaxtrain.objectives.policies:ClippedPolicy",
    "CISPO": "jaxtrain.objectives.policies:CISPO",
    "DAPO": "jaxtrain.objectives.policies:DAPO",
    "GRPO": "jaxtrain.objectives.policies:GRPO",
    "GSPO": "jaxtrain.objectives.policies:GSPO",
    "PPO": "jaxtrain.objectives.policies:PPO",
    "RLOO": "jaxtrain.objectives.policies:RLOO",
    "SAPO": "jaxtrain.objectives.policies:SAPO",
    "VESPO": "jaxtrain.objectives.policies:VESPO",
    "DrGRPO": "jaxtrain.objectives.policies:DrGRPO",
    "ReinforcePlusPlus": "jaxtrain.objectives.policies:ReinforcePlusPlus",
    "PolicyObjective": "jaxtrain.objectives.policy:PolicyObjective",
    "ClippedValue": "jaxtrain.objectives.value:ClippedValue",
    "weighted_mean": "jaxtrain.objectives.objective:weighted_mean",
    "bundle_sums": "jaxtrain.objectives.segments:bundle_sums",
    "segment_means": "jaxtrain.objectives.segments:segment_means",
    "segment_sums": "jaxtrain.objectives.segments:segment_sums",
    "Batch": "jaxtrain.types:Batch",
    "Example": "jaxtrain.types:Example",
    "Max": "jaxtrain.types:Max",
    "Mean": "jaxtrain.types:Mean",
    "Min": "jaxtrain.types:Min",
    "Norm": "jaxtrain.types:Norm",
    "Scores": "jaxtrain.types:Scores",
}

__all__ = [
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "GOLD",
    "GRPO",
    "GSPO",
    "KTO",
    "ORPO",
    "PPO",
    "RLOO",
    "SAPO",
    "SFT",
    "ULD",
    "VESPO",
    "Batch",
    "BradleyTerry",
    "ClippedPolicy",
    "ClippedValue",
    "Correct",
    "Distill",
    "Divergence",
    "DrGRPO",
    "Entropy",
    "Example",
    "HybridDistance",
    "Logp",
    "Max",
    "Mean",
    "Min",
    "Norm",
    "Objective",
    "PointwiseReward",
    "PolicyObjective",
    "PreferenceObjective",
    "ReinforcePlusPlus",
    "Reward",
    "Scores",
    "SimPO",
    "TopLogps",
    "Value",
    "bundle_sums",
    "segment_means",
    "segment_sums",
    "weighted_mean",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
