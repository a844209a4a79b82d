"""Frozen dataclasses, one file per flag group: a field is a flag, the text under it is the flag's help."""

from open_lm.config.averaging import AveragingConfig
from open_lm.config.checkpoint import CheckpointConfig
from open_lm.config.data import DataConfig
from open_lm.config.distributed import DistributedConfig
from open_lm.config.eval import EvalConfig
from open_lm.config.later import LaterConfig
from open_lm.config.log import LogConfig
from open_lm.config.model import ModelConfig, ModelFlags
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig
from open_lm.config.run import RunConfig

__all__ = [
    "AveragingConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "LaterConfig",
    "LogConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelFlags",
    "OptimConfig",
    "RunConfig",
]
