"""jaxtrain: post-train open-weight language models in JAX.

    import jaxtrain as jt

These names are stable, and their modules are imported when they are used. See docs/start.md and docs/reference.md.
"""

import os
import warnings
from typing import TYPE_CHECKING

from jaxtrain.lazy import lazy

if TYPE_CHECKING:
    from jaxtrain import objectives, rl
    from jaxtrain.config import (
        ConfigError,
        RunConfig,
        load_config,
        parse_config,
    )
    from jaxtrain.config import (
        SourceSection as Dataset,
    )
    from jaxtrain.parallel import mesh
    from jaxtrain.recipes.run import run
    from jaxtrain.rl.algorithms import Algorithm
    from jaxtrain.rl.environments import Environment, Opening, Reply
    from jaxtrain.roles.role import Role, TrainedRole
    from jaxtrain.sample.requests import Completion, SamplingParams
    from jaxtrain.serve.python_api import generate, load
    from jaxtrain.session.export import export_run, save
    from jaxtrain.session.session import Outcome, Session

__version__ = "0.1.0"

# Disables transformers' warning that torch is not installed: only its tokenizers are used.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# tqdm, which transformers imports, asks for ipywidgets in a notebook. jaxtrain shows no bars of tqdm.
warnings.filterwarnings("ignore", "IProgress not found")

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
    "load": "jaxtrain.serve.python_api:load",
    "generate": "jaxtrain.serve.python_api:generate",
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

__getattr__, __dir__ = lazy(__name__, _WHERE)
