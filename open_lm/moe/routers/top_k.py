"""Top-k routing: each token goes to the K experts it scores highest.

Shapes: T tokens, E experts, K choices per token, G groups of experts.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.routing import Context, Routing, sort_by_expert

EPS = 1e-20  # DeepSeek-V3's, in the sum of sigmoid scores


def top_k(logits_TE: Tensor, config: MoEConfig, context: Context) -> Routing:
    """Each token goes to its K experts of the highest scores, which are its weights.

    Scores are a softmax over all E experts, over the K chosen (--moe-score-order after), or sigmoids. The
    selection alone sees the bias of --moe-balance bias, the groups and the noise. Sources: Shazeer et al.
    (1701.06538); DeepSeek-V3 (2412.19437), eq. 12-16, for sigmoids, groups and bias.
    """
    logits_TE = logits_TE.float()
    score_TE = logits_TE.softmax(dim=-1) if config.score == "softmax" else logits_TE.sigmoid()
    chosen_TK = select(score_TE, logits_TE, config, context)
    if config.score_order == "after":
        weight_TK = logits_TE.gather(1, chosen_TK).softmax(dim=-1)
    else:
        weight_TK = score_TE.gather(1, chosen_TK)
    if config.normalize_weights:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + EPS)
    if config.score == "softmax":
        probability_TE = score_TE
    else:
        probability_TE = score_TE / (score_TE.sum(dim=-1, keepdim=True) + EPS)
    return sort_by_expert(
        chosen_TK,
        weight_TK * config.weight_scale,
        logits_TE,
        probability_TE=probability_TE,
        choice_TK=score_TE.detach().topk(config.top_k, dim=-1).indices
        if _biased(config, context)
        else chosen_TK,
    )


def select(score_TE: Tensor, logits_TE: Tensor, config: MoEConfig, context: Context) -> Tensor:
    """expert_TK, int64, best first: the K highest of score + bias, within the best groups, noisy in training."""
    with torch.no_grad():
        key_TE = score_TE
        if context.bias_E is not None:
            key_TE = key_TE + context.bias_E
        if config.noise != "none" and context.training:
            key_TE = noisy(key_TE, logits_TE, config)
        if config.num_groups > 1:
            key_TE = within_groups(key_TE, config)
        return key_TE.topk(config.top_k, dim=-1).indices


def noisy(key_TE: Tensor, logits_TE: Tensor, config: MoEConfig) -> Tensor:
    """Logits plus Gumbel noise: their top K is a sample of K experts without replacement (1611.01144).

    With `second_expert` the first choice is that of the keys without noise (GShard, DeepSpeed's top-2).
    """
    uniform_TE = torch.rand_like(logits_TE)
    sampled_TE = logits_TE - (-uniform_TE.clamp(min=torch.finfo(uniform_TE.dtype).tiny).log()).log()
    if config.noise == "rsample":
        return sampled_TE
    first_T1 = key_TE.argmax(dim=-1, keepdim=True)
    return sampled_TE.scatter(1, first_T1, torch.inf)


def within_groups(key_TE: Tensor, config: MoEConfig) -> Tensor:
    """key_TE with -inf outside of each token's best groups: those whose best K/top_groups keys sum highest."""
    key_TGE = key_TE.unflatten(1, (config.num_groups, -1))
    best = key_TGE.topk(config.top_k // config.top_groups, dim=-1).values.sum(dim=-1)
    groups_TG = torch.zeros_like(best, dtype=torch.bool)
    groups_TG = groups_TG.scatter(1, best.topk(config.top_groups, dim=-1).indices, True)
    return key_TGE.masked_fill(~groups_TG[..., None], -torch.inf).flatten(1)


def _biased(config: MoEConfig, context: Context) -> bool:
    """Whether the selection is not simply by the scores."""
    noise = config.noise != "none" and context.training
    return context.bias_E is not None or noise or config.num_groups > 1
