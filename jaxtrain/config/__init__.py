"""The tree of a run."""

from jaxtrain.config.given import ROWS as ROWS
from jaxtrain.config.load import ALIASES as ALIASES
from jaxtrain.config.load import ConfigError as ConfigError
from jaxtrain.config.load import config_tree as config_tree
from jaxtrain.config.load import dump_config as dump_config
from jaxtrain.config.load import known_keys as known_keys
from jaxtrain.config.load import load_config as load_config
from jaxtrain.config.load import parse_config as parse_config
from jaxtrain.config.rl import RLSection as RLSection
from jaxtrain.config.run import RunConfig as RunConfig
from jaxtrain.config.sections import CheckpointSection as CheckpointSection
from jaxtrain.config.sections import DataSection as DataSection
from jaxtrain.config.sections import EvalSection as EvalSection
from jaxtrain.config.sections import LogSection as LogSection
from jaxtrain.config.sections import LoraSection as LoraSection
from jaxtrain.config.sections import MeshSection as MeshSection
from jaxtrain.config.sections import ModelSection as ModelSection
from jaxtrain.config.sections import ModulesSection as ModulesSection
from jaxtrain.config.sections import OptimizerSection as OptimizerSection
from jaxtrain.config.sections import RunSection as RunSection
from jaxtrain.config.sections import SourceSection as SourceSection
from jaxtrain.config.sections import TrainSection as TrainSection
