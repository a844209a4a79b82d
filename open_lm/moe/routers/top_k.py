"""Top-k routing: each token goes to the K experts it scores highest.

Shapes: T tokens, E experts, K choices per token, G groups of experts.
"""

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.backends import resolve
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
    # Before bias and groups: what the balancing losses count. Where the scores come after the selection, the
    # logits choose (Megatron): a softmax over all E may underflow, and its ties would be broken by chance.
    key_TE = logits_TE if config.score_order == "after" else score_TE
    if config.noise != "none" and context.training:
        key_TE = noisy(key_TE, logits_TE, config)
    chosen_TK = select(key_TE, config, context)
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
    limited = context.bias_E is not None or config.num_groups > 1
    return sort_by_expert(
        chosen_TK,
        weight_TK * config.weight_scale,
        logits_TE,
        kernels=resolve(config.backend) == "triton",
        probability_TE=probability_TE,
        choice_TK=best(key_TE.detach(), config) if limited else chosen_TK,
    )


@torch.no_grad()
def select(key_TE: Tensor, config: MoEConfig, context: Context) -> Tensor:
    """expert_TK, int64, best first: the K highest of key + bias, within the best groups."""
    if context.bias_E is not None:
        key_TE = key_TE + context.bias_E
    if config.num_groups > 1:
        key_TE = within_groups(key_TE, config)
    return best(key_TE, config)


def best(key_TE: Tensor, config: MoEConfig) -> Tensor:
    """expert_TK, int64: the K highest keys, best first."""
    if key_TE.is_cuda and resolve(config.backend) == "triton":
        from open_lm.moe.backends.triton.selection import top_k

        return top_k(key_TE, config.top_k)
    return key_TE.topk(config.top_k, dim=-1).indices


@torch.no_grad()
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
    """key_TE with -inf outside of each token's best groups: those whose best K/top_groups keys sum highest.

    DeepSeek-V3's and Megatron's rule; DeepSeek-V2 judges a group by its best key alone.
    """
    key_TGE = key_TE.unflatten(1, (config.num_groups, -1))
    best = key_TGE.topk(config.top_k // config.top_groups, dim=-1).values.sum(dim=-1)
    groups_TG = torch.zeros_like(best, dtype=torch.bool)
    groups_TG = groups_TG.scatter(1, best.topk(config.top_groups, dim=-1).indices, True)
    return key_TGE.masked_fill(~groups_TG[..., None], -torch.inf).flatten(1)
