"""Combine weights of routers that choose K experts for each token.

Shapes: T tokens, E experts, K choices per token.
"""

from torch import Tensor

from open_lm.config.moe import MoEConfig

EPS = 1e-20


def finish(weight_TK: Tensor, config: MoEConfig) -> Tensor:
    """weight_TK after --moe-normalize-weights and --moe-weight-scale."""
    if config.normalize_weights:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + EPS)
    return weight_TK * config.weight_scale
