"""S-BASE: tokens choose from a plan in which all experts have the same share.

Shapes: T tokens, E experts, K choices per token.
"""

import math

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.weights import softmax_weights
from open_lm.moe.routing import Context, Routing, sort_by_expert

# A fixed number, so that nothing waits for a test of convergence. With normal logits of 2,048 tokens, 8 to 128
# experts, the loads after 8 and after 32 differ by less than 1%.
ITERATIONS = 8


def sinkhorn(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """In training each token goes to the K experts of its largest shares in `plan`, in evaluation to those of its
    highest logits. Weights: their sigmoids with K = 1, else the softmax over all experts.

    Not causal in training. The plan carries no gradient. Source: Clark et al. (2202.01169), S-BASE, in
    Megatron-LM's form, but with a limit on iterations and in logarithms.
    """
    logits_TE = logits_TE.float()
    with torch.no_grad():
        key_TE = plan(logits_TE, context.real_T) if context.training else logits_TE
        expert_TK = key_TE.topk(config.top_k, dim=-1).indices
    if config.top_k == 1:
        weight_TK = logits_TE.gather(1, expert_TK).sigmoid() * config.weight_scale
    else:
        weight_TK = softmax_weights(logits_TE, expert_TK, config)
    return sort_by_expert(expert_TK, weight_TK, logits_TE)


def plan(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """log of exp(logits_TE) scaled by rows and columns until each token has 1/T and each expert 1/E in sum.

    In logarithms, so any finite logits do. Padding (real_T False) takes no part in the experts' sums.
    """
    T, E = logits_TE.shape
    column_E = logits_TE.new_zeros(E)
    row_T1 = logits_TE.new_zeros(T, 1)
    log_T = math.log(max(T, 1)) if real_T is None else real_T.sum().clamp(min=1).log()
    for _ in range(ITERATIONS if T else 0):
        row_T1 = -log_T - (logits_TE + column_E).logsumexp(dim=1, keepdim=True)
        share_TE = logits_TE + row_T1
        if real_T is not None:
            # not -inf: where all is padding, the sums stay finite
            share_TE = share_TE.masked_fill(~real_T[:, None], torch.finfo(share_TE.dtype).min / 2)
        column_E = -math.log(E) - share_TE.logsumexp(dim=0)
    return logits_TE + row_T1 + column_E
