"""Combine weights of routers that choose K experts for each token.

Shapes: T tokens, E experts, K choices per token.
"""

from torch import Tensor

from open_lm.config.moe import MoEConfig


def softmax_weights(logits_TE: Tensor, expert_TK: Tensor, config: MoEConfig) -> Tensor:
    """weight_TK: the chosen experts' shares in the softmax over all, times --moe-weight-scale.

    With --moe-normalize-weights in the softmax over the chosen: the same as dividing by their sum, but right where
    all of them are too improbable for float32.
    """
    if config.normalize_weights:
        weight_TK = logits_TE.gather(1, expert_TK).softmax(dim=-1)
    else:
        weight_TK = logits_TE.softmax(dim=-1).gather(1, expert_TK)
    return weight_TK * config.weight_scale
