"""Round robin: exactly even loads, for benchmarks.

Shapes: T tokens, E experts, K choices per token.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.weights import softmax_weights
from open_lm.moe.routing import Context, Routing, sort_by_expert


def uniform(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Token t goes to experts tK, tK+1, … tK+K-1 (mod E), so loads differ by at most one; padding is passed over.

    Weights are the softmax over all experts, so that a step does all the work of `top_k`, the router's gradient
    too, and differs in the loads alone.
    """
    T, E = logits_TE.shape
    logits_TE = logits_TE.float()
    turn_T = torch.arange(T, device=logits_TE.device)
    if context.real_T is not None:
        turn_T = context.real_T.cumsum(0) - context.real_T.long()
    choice_K = torch.arange(config.top_k, device=logits_TE.device)
    expert_TK = (turn_T[:, None] * config.top_k + choice_K) % E
    return sort_by_expert(expert_TK, softmax_weights(logits_TE, expert_TK, config), logits_TE)
