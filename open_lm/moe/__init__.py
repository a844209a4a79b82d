"""Mixture-of-experts layers for any network: `y, stats = MoE(MoEConfig(dim=64, num_experts=8))(x)`."""

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE, Tokens
from open_lm.moe.stats import RouterStats, router_loss

__all__ = ["MoE", "MoEConfig", "RouterStats", "Tokens", "router_loss"]
