"""Training objectives. Each is a frozen dataclass of numbers that is called with scores: see `Objective`."""

from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain.objectives.objective import Correct as Correct
    from jaxtrain.objectives.objective import Entropy as Entropy
    from jaxtrain.objectives.objective import Logp as Logp
    from jaxtrain.objectives.objective import Objective as Objective
    from jaxtrain.objectives.objective import Value as Value
    from jaxtrain.objectives.policies import CISPO as CISPO
    from jaxtrain.objectives.policies import DAPO as DAPO
    from jaxtrain.objectives.policies import GRPO as GRPO
    from jaxtrain.objectives.policies import GSPO as GSPO
    from jaxtrain.objectives.policies import PPO as PPO
    from jaxtrain.objectives.policies import RLOO as RLOO
    from jaxtrain.objectives.policies import DrGRPO as DrGRPO
    from jaxtrain.objectives.policies import ReinforcePlusPlus as ReinforcePlusPlus
    from jaxtrain.objectives.policy import PolicyObjective as PolicyObjective
    from jaxtrain.objectives.sft import SFT as SFT
    from jaxtrain.objectives.value import ClippedValue as ClippedValue

_WHERE = {
    "Objective": "jaxtrain.objectives.objective:Objective",
    "Logp": "jaxtrain.objectives.objective:Logp",
    "Entropy": "jaxtrain.objectives.objective:Entropy",
    "Correct": "jaxtrain.objectives.objective:Correct",
    "Value": "jaxtrain.objectives.objective:Value",
    "SFT": "jaxtrain.objectives.sft:SFT",
    "CISPO": "jaxtrain.objectives.policies:CISPO",
    "DAPO": "jaxtrain.objectives.policies:DAPO",
    "GRPO": "jaxtrain.objectives.policies:GRPO",
    "GSPO": "jaxtrain.objectives.policies:GSPO",
    "PPO": "jaxtrain.objectives.policies:PPO",
    "RLOO": "jaxtrain.objectives.policies:RLOO",
    "DrGRPO": "jaxtrain.objectives.policies:DrGRPO",
    "ReinforcePlusPlus": "jaxtrain.objectives.policies:ReinforcePlusPlus",
    "PolicyObjective": "jaxtrain.objectives.policy:PolicyObjective",
    "ClippedValue": "jaxtrain.objectives.value:ClippedValue",
}

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "RLOO",
    "SFT",
    "ClippedValue",
    "Correct",
    "DrGRPO",
    "Entropy",
    "Logp",
    "Objective",
    "PolicyObjective",
    "ReinforcePlusPlus",
    "Value",
]

__getattr__ = lazy(__name__, _WHERE)
