"""Routers: how tokens choose experts. Each is a function (logits_TE, MoEConfig) -> Routing in `ROUTERS`.

Shapes: T tokens, E experts, K choices per token.
"""

from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routing import Routing, sort_by_expert


def top_k(logits_TE: Tensor, config: MoEConfig) -> Routing:
    """Each token goes to its K most probable experts; the weights are those probabilities.

    The softmax is over all E experts in float32. With `normalize_weights` a token's K weights sum to one.
    Source: Shazeer et al. (1701.06538); not renormalised in OLMoE and MegaBlocks, renormalised in Mixtral.
    """
    probability_TE = logits_TE.float().softmax(dim=-1)
    weight_TK, expert_TK = probability_TE.topk(config.top_k, dim=-1)
    if config.normalize_weights:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return sort_by_expert(expert_TK, weight_TK, logits_TE)


ROUTERS = {function.__name__: function for function in (top_k,)}
