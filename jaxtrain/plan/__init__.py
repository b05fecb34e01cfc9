"""`jaxtrain plan`: what a config needs and how fast it would be, on devices that are not there. See docs/plan.md."""

from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain.plan.planner import plan
    from jaxtrain.plan.report import RunPlan

_WHERE = {"plan": "jaxtrain.plan.planner:plan", "RunPlan": "jaxtrain.plan.report:RunPlan"}

__all__ = ["RunPlan", "plan"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
