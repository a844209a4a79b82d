"""ST-MoE's top-n: second and further choices only where their weight is worth it.

Shapes: T tokens, E experts, K choices per token, R rows.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routing import Context, Routing, keep, sort_by_expert

EPS = 1e-9  # ST-MoE's, in the sum of a token's gates


def threshold(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Each token goes to its best expert, and to its K-1 next ones by chance, more likely the higher their gate.

    Gates are the K largest probabilities over their sum, so weights sum to 1 before anything is removed, whether
    --moe-normalize-weights is given or not. `stay` says which choices are removed, before capacity. Source: Zoph
    et al. (2202.08906), st-moe-pytorch; the latter's capacity is --moe-drop-policy choice
    --moe-capacity-per sequence --moe-min-capacity 4 with our factor times K as its factor.
    """
    logits_TE = logits_TE.float()
    p_TE = logits_TE.softmax(dim=-1)
    top_TK, expert_TK = p_TE.topk(config.top_k, dim=-1)
    gate_TK = renormalize(top_TK)
    routing = sort_by_expert(
        expert_TK, gate_TK * config.weight_scale, logits_TE, probability_TE=p_TE, choice_TK=expert_TK
    )
    return remove(routing, stay(gate_TK.detach(), config, context))


def renormalize(gate_TK: Tensor) -> Tensor:
    """Each token's gates over their sum, at least EPS."""
    return gate_TK / gate_TK.sum(dim=-1, keepdim=True).clamp(min=EPS)


def stay(gate_TK: Tensor, config: MoEConfig, context: Context) -> Tensor:
    """kept_TK, bool: the first choice always; choice j >= 2 with probability gate / threshold.

    So in training. In evaluation, where ST-MoE draws too, the likelier of the two happens, so that it repeats: a
    choice stays where gate / threshold > 1/2. The threshold is --moe-threshold, in evaluation
    --moe-eval-threshold if it is given.
    """
    limit = config.threshold
    if not context.training and config.eval_threshold is not None:
        limit = config.eval_threshold
    if isinstance(limit, tuple):  # column by column: a tensor of them would be waited for on a GPU
        ratio_TK = torch.stack([gate_TK[:, 0], *(gate_TK[:, j] / t for j, t in enumerate(limit, 1))], dim=1)
    else:
        ratio_TK = gate_TK / limit
    draw_TK = torch.rand_like(gate_TK) if context.training else torch.full_like(gate_TK, 0.5)
    first_K = torch.arange(gate_TK.shape[1], device=gate_TK.device) == 0
    return first_K | (draw_TK < ratio_TK)


def remove(routing: Routing, kept_TK: Tensor) -> Routing:
    """`keep` by token and choice."""
    row_TK = routing.row_TK
    assert row_TK is not None
    kept_R = torch.empty_like(routing.token_R, dtype=torch.bool)
    return keep(routing, kept_R.scatter(0, row_TK.flatten(), kept_TK.flatten()))
