"""jaxtrain: post-train open-weight language models in JAX.

    import jaxtrain as jt

The names of this page are stable; importing it imports nothing else. See docs/start.md and docs/reference.md.
"""

import os
from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain import objectives as objectives
    from jaxtrain import rl as rl
    from jaxtrain.config import ConfigError as ConfigError
    from jaxtrain.config import RunConfig as RunConfig
    from jaxtrain.config import SourceSection as Dataset
    from jaxtrain.config import load_config as load_config
    from jaxtrain.config import parse_config as parse_config
    from jaxtrain.parallel import mesh as mesh
    from jaxtrain.recipes.run import run as run
    from jaxtrain.rl.algorithms import Algorithm as Algorithm
    from jaxtrain.rl.environments import Environment as Environment
    from jaxtrain.rl.environments import Opening as Opening
    from jaxtrain.rl.environments import Reply as Reply
    from jaxtrain.roles.role import Role as Role
    from jaxtrain.roles.role import TrainedRole as TrainedRole
    from jaxtrain.sample.requests import Completion as Completion
    from jaxtrain.sample.requests import SamplingParams as SamplingParams
    from jaxtrain.serve.generate import generate as generate
    from jaxtrain.serve.generate import load as load
    from jaxtrain.session.export import export_run as export_run
    from jaxtrain.session.export import save as save
    from jaxtrain.session.session import Outcome as Outcome
    from jaxtrain.session.session import Session as Session

__version__ = "0.1.0"

# Read when transformers is imported, which says that torch is not there: only its tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_WHERE = {
    "parse_config": "jaxtrain.config:parse_config",
    "load_config": "jaxtrain.config:load_config",
    "RunConfig": "jaxtrain.config:RunConfig",
    "ConfigError": "jaxtrain.config:ConfigError",
    "Dataset": "jaxtrain.config:SourceSection",
    "run": "jaxtrain.recipes.run:run",
    "Outcome": "jaxtrain.session.session:Outcome",
    "Session": "jaxtrain.session.session:Session",
    "Role": "jaxtrain.roles.role:Role",
    "TrainedRole": "jaxtrain.roles.role:TrainedRole",
    "load": "jaxtrain.serve.generate:load",
    "generate": "jaxtrain.serve.generate:generate",
    "SamplingParams": "jaxtrain.sample.requests:SamplingParams",
    "Completion": "jaxtrain.sample.requests:Completion",
    "save": "jaxtrain.session.export:save",
    "export_run": "jaxtrain.session.export:export_run",
    "Environment": "jaxtrain.rl.environments:Environment",
    "Opening": "jaxtrain.rl.environments:Opening",
    "Reply": "jaxtrain.rl.environments:Reply",
    "Algorithm": "jaxtrain.rl.algorithms:Algorithm",
    "objectives": "jaxtrain.objectives",
    "rl": "jaxtrain.rl",
    "mesh": "jaxtrain.parallel.mesh",
}

__all__ = [
    "Algorithm",
    "Completion",
    "ConfigError",
    "Dataset",
    "Environment",
    "Opening",
    "Outcome",
    "Reply",
    "Role",
    "RunConfig",
    "SamplingParams",
    "Session",
    "TrainedRole",
    "export_run",
    "generate",
    "load",
    "load_config",
    "mesh",
    "objectives",
    "parse_config",
    "rl",
    "run",
    "save",
]

__getattr__ = lazy(__name__, _WHERE)
