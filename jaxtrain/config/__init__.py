"""The tree of a run."""

from jaxtrain.config.aliases import ALIASES
from jaxtrain.config.data import DataSection, SourceSection
from jaxtrain.config.evaluation import EvalSection
from jaxtrain.config.keys import known_keys
from jaxtrain.config.load import (
    ConfigError,
    config_tree,
    dump_config,
    load_config,
    parse_config,
)
from jaxtrain.config.model import LoraSection, ModelSection, ModulesSection
from jaxtrain.config.outputs import CheckpointSection, LogSection
from jaxtrain.config.python_values import ROWS_PREFIX
from jaxtrain.config.rl import RLSection
from jaxtrain.config.run_config import RunConfig
from jaxtrain.config.sections import MeshSection, OptimizerSection, ReferenceSection, RunSection, TrainSection
from jaxtrain.config.teacher import TeacherSection

__all__ = [
    "ALIASES",
    "ROWS_PREFIX",
    "CheckpointSection",
    "ConfigError",
    "DataSection",
    "EvalSection",
    "LogSection",
    "LoraSection",
    "MeshSection",
    "ModelSection",
    "ModulesSection",
    "OptimizerSection",
    "RLSection",
    "ReferenceSection",
    "RunConfig",
    "RunSection",
    "SourceSection",
    "TeacherSection",
    "TrainSection",
    "config_tree",
    "dump_config",
    "known_keys",
    "load_config",
    "parse_config",
]
