"""Expert choice in which no token sees a later one of its own sequence.

Shapes: T tokens, B sequences, S positions, E experts, C places of an expert at one position.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.capacity import capacity
from open_lm.moe.routers.expert_choice import fill, places, preferences
from open_lm.moe.routing import Context, Routing


def expert_choice_causal(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """At each position, each expert takes the C of the B sequences' tokens that suit it best (cf. 2202.09368).

    C is the capacity of B tokens, int(factor * k * B / E), at least 1. What it needs of the batch: B sequences of
    one length, B >= E / (factor * k), a multiple of it for the load that the flags ask for; with fewer sequences
    C is 1 and experts take more tokens than that, with B = 1 every expert takes every token. A token's experts
    depend on which sequences it shares the batch with, in evaluation and generation too.
    """
    logits_TE = logits_TE.float()
    p_TE = logits_TE.softmax(dim=-1)
    T, E = p_TE.shape
    B = max(context.sequences, 1)
    S = T // B
    C = places(capacity(B, config, training=context.training), B)
    sequence_CSE = preferences(p_TE, context).view(B, S, E).topk(C, dim=0).indices
    token_CSE = sequence_CSE * S + torch.arange(S, device=p_TE.device)[:, None]
    return fill(token_CSE.permute(2, 0, 1).reshape(E, -1), p_TE, logits_TE, config)
