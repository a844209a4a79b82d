"""Which layers of a Transformer are mixtures of experts, and of what size."""

from dataclasses import replace

from open_lm.config.model import ModelConfig
from open_lm.config.moe import MoEConfig
from open_lm.config.moe_layers import layer_numbers


def moe_layers(config: ModelConfig) -> tuple[int, ...]:
    """The layers whose FFN is an MoE: N % moe.freq == 0 (open_lm), a list, or Megatron's pattern; () if dense."""
    return layer_numbers(config.moe, config.n_layers)


def layer_config(config: ModelConfig, layer: int) -> MoEConfig:
    """The configuration of layer number `layer` by itself: its width, and its own number of experts."""
    experts = config.moe.num_experts
    if isinstance(experts, tuple):
        experts = experts[moe_layers(config).index(layer)]
    return replace(config.moe, dim=config.dim, num_experts=experts, dense_before=False, dense_after=False)
