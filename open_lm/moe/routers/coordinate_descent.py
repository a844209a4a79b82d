"""ST-MoE's differentiable top-k: the weights are a smooth top-k of the probabilities.

Shapes: T tokens, E experts, K choices per token.
"""

import math

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.threshold import remove, renormalize, stay
from open_lm.moe.routing import Context, Routing, sort_by_expert

ITERATIONS = 20
EPSILON = 0.1
RATIO = 9 / 8  # CoLT5 (2303.09752): the smooth top-k lets in a little more than K


def coordinate_descent(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """`threshold`, but a token's gates are its K best experts' shares in `smooth_top_k`, over their sum.

    So an expert's gate also has a gradient towards experts that were not chosen. Each token is for itself: causal.
    To remove nothing, as in CoLT5, give a --moe-threshold near 0. Source: st-moe-pytorch with
    differentiable_topk; CoLT5 (2303.09752).
    """
    logits_TE = logits_TE.float()
    p_TE = logits_TE.softmax(dim=-1)
    expert_TK = p_TE.detach().topk(config.top_k, dim=-1).indices
    share_TE = smooth_top_k(p_TE, min(config.top_k * RATIO, p_TE.shape[1]))
    gate_TK = renormalize(share_TE.gather(1, expert_TK))
    routing = sort_by_expert(
        expert_TK, gate_TK * config.weight_scale, logits_TE, probability_TE=p_TE, choice_TK=expert_TK
    )
    return remove(routing, stay(gate_TK.detach(), config, context))


def smooth_top_k(score_TE: Tensor, k: float) -> Tensor:
    """Shares in 0…1 that sum to k per token: the entropy-regularised top-k of its scores, by coordinate descent.

    a moves the shares' sum to k, b <= 0 holds each at 1 or below, in turns. Source: CoLT5 (2303.09752).
    """
    log_k = math.log(k)
    a_T1 = torch.zeros_like(score_TE[:, :1])
    b_TE = -score_TE
    for _ in range(ITERATIONS):
        a_T1 = EPSILON * (log_k - ((score_TE + b_TE) / EPSILON).logsumexp(dim=-1, keepdim=True))
        b_TE = -(score_TE + a_T1).relu()
    return ((score_TE + a_T1 + b_TE) / EPSILON).exp()
