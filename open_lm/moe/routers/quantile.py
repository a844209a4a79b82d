"""Quantile-balanced top-k: a price for each expert evens out the loads of a batch.

Shapes: T tokens, E experts, K choices per token.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routers.weights import softmax_weights
from open_lm.moe.routing import Context, Routing, sort_by_expert

# With normal logits of 2,048 tokens, 8 to 128 experts, the fullest expert is then within 4% of the mean.
ITERATIONS = 4


def quantile(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Each token goes to its K experts of the highest logit - price; weights are the softmax over all experts.

    With --moe-normalize-weights they are the softmax over the K chosen, Megatron's default. Not causal: the
    prices are those of this very batch, in evaluation too. Source: Megatron-LM's quantile balancing, which makes
    one step of `prices` per batch and applies it in the next one.
    """
    logits_TE = logits_TE.float()
    with torch.no_grad():
        price_E = prices(logits_TE, config.top_k, context.real_T)
        # Where prices have settled, the last expert chosen ties with the next one; a stable sort, unlike topk,
        # decides alike on every device.
        order_TE = (logits_TE - price_E).sort(dim=-1, descending=True, stable=True).indices
        expert_TK = order_TE[:, : config.top_k]
    return sort_by_expert(expert_TK, softmax_weights(logits_TE, expert_TK, config), logits_TE)


def prices(logits_TE: Tensor, k: int, real_T: Tensor | None = None) -> Tensor:
    """price_E, from 0 in ITERATIONS dual steps: what a token would gain at an expert that it does not choose or
    lose at one that it does is bid_TE; an expert's price lets in the kT/E highest bids. Padding does not bid."""
    T, E = logits_TE.shape
    price_E = logits_TE.new_zeros(E)
    if k == E or not T:
        return price_E
    tokens = T if real_T is None else real_T.sum()
    for _ in range(ITERATIONS):
        rival_T1 = (logits_TE - price_E).topk(k + 1, dim=-1).values[:, k:]
        bid_TE = logits_TE - rival_T1
        if real_T is not None:
            bid_TE = bid_TE.masked_fill(~real_T[:, None], torch.finfo(bid_TE.dtype).min / 2)
        price_E = highest(bid_TE, tokens * k // E)
    return price_E


def highest(bid_TE: Tensor, n: int | Tensor) -> Tensor:
    """The (n+1)-th highest bid at each expert."""
    if isinstance(n, int):
        return bid_TE.topk(n + 1, dim=0).values[n]
    # how many are no padding is known on the device alone
    return bid_TE.sort(dim=0, descending=True).values.index_select(0, n.view(1))[0]
