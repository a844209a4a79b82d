"""Hash layers: which experts a token goes to is fixed from the start.

Shapes: T tokens, E experts, K choices per token.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routing import Context, Routing, sort_by_expert

BITS = 0xFFFFFFFF


def hash(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Each token goes to K different experts by a hash of its id, the same in all layers, each with weight 1/K.

    Without ids (`Tokens.ids`) by a hash of its position in the sequence. The router's logits play no part: it
    learns nothing, as in the paper. Source: Roller et al. (2106.04426), random hash.
    """
    T, E = logits_TE.shape
    id_T = context.id_T
    if id_T is None:
        id_T = torch.arange(T, device=logits_TE.device) % max(T // max(context.sequences, 1), 1)
    experts_E = torch.arange(E, device=logits_TE.device)
    # a random order of experts for every id; the last term decides between equal numbers
    order_TE = mix(mix(id_T)[:, None] + experts_E) * E + experts_E
    expert_TK = order_TE.topk(config.top_k, dim=-1).indices
    weight_TK = torch.full_like(expert_TK, 1, dtype=torch.float32) * (config.weight_scale / config.top_k)
    return sort_by_expert(expert_TK, weight_TK, logits_TE.float())


def mix(number: Tensor) -> Tensor:
    """A 32-bit hash of each int64: multiply and shift, small enough factors not to overflow 63 bits."""
    number = number & BITS
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & BITS
    return number ^ (number >> 16)
