"""Expert choice: each expert takes the C tokens that it suits best, so all experts have the same load.

Shapes: T tokens, G groups of S tokens that compete with each other, E experts, C capacity, N rows of an expert.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routing import Context, Routing


def expert_choice(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Each expert takes its `context.capacity` tokens of the highest probability, which is their weight.

    Probabilities are a softmax over experts. Tokens of the batch compete, or of each sequence with
    --moe-capacity-per sequence; a token may get any number of experts, none too. A capacity of 0 (few tokens:
    factor * k * T / E < 1) acts as 1. Not causal: whether a token is taken depends on the tokens after it.
    Source: Zhou et al. (2202.09368).
    """
    logits_TE = logits_TE.float()
    p_TE = logits_TE.softmax(dim=-1)
    T, E = p_TE.shape
    G = max(context.sequences, 1) if config.capacity_per == "sequence" else 1
    S = T // G
    best_GCE = preferences(p_TE, context).view(G, S, E).topk(places(context.capacity, S), dim=1).indices
    token_GCE = best_GCE + S * torch.arange(G, device=p_TE.device)[:, None, None]
    return fill(token_GCE.permute(2, 0, 1).reshape(E, -1), p_TE, logits_TE, config)


def preferences(p_TE: Tensor, context: Context) -> Tensor:
    """What experts choose by: the probabilities, without gradient; padding comes last."""
    p_TE = p_TE.detach()
    return p_TE if context.real_T is None else p_TE.masked_fill(~context.real_T[:, None], -1.0)


def places(capacity: int, tokens: int) -> int:
    """How many of `tokens` an expert takes: its capacity, at least 1, at most all."""
    return min(max(capacity, 1), tokens)


def fill(token_EN: Tensor, p_TE: Tensor, logits_TE: Tensor, config: MoEConfig) -> Routing:
    """The Routing of N different tokens per expert, weighted by their probabilities."""
    token_EN = token_EN.sort(dim=1).values
    weight_EN = p_TE.t().gather(1, token_EN) * config.weight_scale
    return Routing(
        token_R=token_EN.flatten(),
        weight_R=weight_EN.flatten(),
        count_E=token_EN.new_full((token_EN.shape[0],), token_EN.shape[1]),
        logits_TE=logits_TE,
        probability_TE=p_TE,
    )
