"""All groups together: what `main` works from."""

from dataclasses import dataclass, field

from open_lm.config.averaging import AveragingConfig
from open_lm.config.checkpoint import CheckpointConfig
from open_lm.config.data import DataConfig
from open_lm.config.distributed import DistributedConfig
from open_lm.config.eval import EvalConfig
from open_lm.config.later import LaterConfig
from open_lm.config.log import LogConfig
from open_lm.config.model import ModelFlags
from open_lm.config.moe import MoEConfig
from open_lm.config.optim import OptimConfig


@dataclass(frozen=True)
class RunConfig:
    """Train and evaluate dense and mixture-of-experts language models."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelFlags = field(default_factory=ModelFlags)
    moe: MoEConfig = field(default_factory=MoEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    later: LaterConfig = field(default_factory=LaterConfig)
