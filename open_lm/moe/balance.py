"""What keeps the experts' loads even: auxiliary losses, and DeepSeek-V3's bias.

Shapes: T tokens, B sequences, S positions, E experts, K choices per token, L MoE layers, N losses.

One convention for all: a loss is 1 when balanced (importance: 0), whatever E, K and T are; the objective has
weight * mean over MoE layers and micro-batches. MOE.md gives the factor to each system's coefficient.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Choices(NamedTuple):
    """What the losses of one layer look at; padding is in none of it."""

    probability_TE: Tensor
    """float32: each token's probabilities, with gradient; zeros for padding."""
    choice_TK: Tensor
    """int64: each token's experts, best first, before bias, groups and drops."""
    count_E: Tensor
    """float32: how often each expert is in choice_TK."""
    real_T: Tensor | None
    """bool: False for padding; None: all are real."""
    sequences: int
    """B; T is B * S."""


def switch_loss(count_E: Tensor, probability_sum_E: Tensor, tokens: Tensor | int) -> Tensor:
    """E * sum_i f_i P_i, a float32 scalar: 1 when balanced, E when every token goes to one expert; 0 for T = 0.

    f_i is expert i's share of the assignments before anything is dropped, without gradient; P_i is its mean
    probability, of which `probability_sum_E` is the sum over `tokens` tokens. Leading axes are of several losses.
    Source: Switch Transformer (2101.03961), eq. 4-6, with Megatron's and MegaBlocks' normalisation by K.
    """
    count_E = count_E.detach().float()
    f_E = count_E / count_E.sum(dim=-1, keepdim=True).clamp(min=1)
    if isinstance(tokens, int):  # as a tensor on a GPU it would be waited for
        P_E = probability_sum_E / max(tokens, 1)
    else:
        P_E = probability_sum_E / tokens.clamp(min=1)[..., None]
    return count_E.shape[-1] * (f_E * P_E).sum(dim=-1)


def aux(choices: Choices) -> Tensor:
    """`switch_loss` of the micro-batch."""
    return switch_loss(choices.count_E, choices.probability_TE.sum(dim=0), _tokens(choices))


def first_choice(choices: Choices) -> Tensor:
    """`switch_loss` that counts each token's first expert alone (GShard, 2006.16668; DeepSpeed's top-1, top-2)."""
    count_E = count(choices.choice_TK[:, :1], *_where(choices))
    return switch_loss(count_E, choices.probability_TE.sum(dim=0), _tokens(choices))


def sequence(choices: Choices) -> Tensor:
    """Mean over sequences of each one's `switch_loss` (DeepSeek-V3, 2412.19437, eq. 17-20).

    Weighted by real tokens, so that a sequence that is all padding counts for nothing.
    """
    B, (T, E) = choices.sequences, choices.probability_TE.shape
    count_BE = count(choices.choice_TK, *_where(choices), B)
    p_BE = choices.probability_TE.view(B, T // max(B, 1), E).sum(dim=1)
    if choices.real_T is None:
        return (
            switch_loss(count_BE, p_BE, T // max(B, 1)).mean() if T else switch_loss(count_BE, p_BE, 0).sum()
        )
    tokens_B = choices.real_T.view(B, -1).sum(dim=1).float()
    return (switch_loss(count_BE, p_BE, tokens_B) * tokens_B).sum() / tokens_B.sum().clamp(min=1)


def importance(choices: Choices) -> Tensor:
    """(CV²(importance) + CV²(load)) / 2: squared coefficients of variation over experts, 0 when even.

    Importance is a sum of probabilities. Load is smooth: the chance that noise of standard deviation 1/E on an
    expert's logit lifts it over the lowest logit that the token chose. Sources: Shazeer et al. (1701.06538),
    section 4; the load with this threshold and noise, and the mean of the two: V-MoE (2106.05974), appendix A.
    Tutel's has the same form, but compares probabilities with logits.
    """
    p_TE = choices.probability_TE
    E = p_TE.shape[1]
    # differences of log-probabilities are those of logits; padding has probability 0
    log_TE = p_TE.clamp(min=torch.finfo(p_TE.dtype).tiny).log()
    last_T1 = log_TE.gather(1, choices.choice_TK).min(dim=-1, keepdim=True).values
    chance_TE = torch.special.ndtr((log_TE - last_T1) * E)
    if choices.real_T is not None:
        chance_TE = chance_TE * choices.real_T[:, None]
    return (_cv_squared(p_TE.sum(dim=0)) + _cv_squared(chance_TE.sum(dim=0))) / 2


# --moe-balance → (Choices) → float32 scalar. What other ranks have counted is put into `global` by `router_loss`.
LOSSES: dict[str, Callable[[Choices], Tensor]] = {
    "aux": aux,
    "sequence": sequence,
    "first_choice": first_choice,
    "importance": importance,
    "global": aux,
}


def router_z_loss(logits_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """Mean over T tokens of logsumexp(logits)², a float32 scalar; 0 for T = 0 (ST-MoE, 2202.08906, eq. 5)."""
    square_T = logits_TE.float().logsumexp(dim=-1).square()
    if real_T is None:
        return square_T.sum() / max(len(square_T), 1)
    return torch.where(real_T, square_T, 0.0).sum() / real_T.sum().clamp(min=1)


def count(choice_TK: Tensor, experts: int, real_T: Tensor | None, sequences: int = 0) -> Tensor:
    """How often each expert was chosen, float32 (E,), or (sequences, E); padding not counted."""
    hit_TE = (choice_TK[..., None] == torch.arange(experts, device=choice_TK.device)).sum(
        dim=1, dtype=torch.float32
    )
    if real_T is not None:
        hit_TE = hit_TE * real_T[:, None]
    if not sequences:
        return hit_TE.sum(dim=0)
    return hit_TE.view(sequences, len(hit_TE) // sequences, experts).sum(dim=1)


@torch.no_grad()
def update_bias_(bias_E: Tensor, count_E: Tensor, rate: float | Tensor) -> None:
    """bias += rate * sign(mean count - count), then recentred to mean 0: the idle become more attractive.

    `count_E` is of a whole optimizer step, over all ranks and micro-batches; with a rate of 0 nothing changes.
    Source: DeepSeek-V3 (2412.19437), section 2.1.2; Wang et al. (2408.15664).
    """
    count_E = count_E.to(torch.promote_types(count_E.dtype, torch.float32))
    step_E = (count_E.mean() - count_E).sign().to(bias_E.dtype) * rate
    bias_E.add_(step_E - step_E.mean())


def _cv_squared(load_E: Tensor) -> Tensor:
    if load_E.numel() == 1:
        return load_E.sum() * 0
    return load_E.var() / (load_E.mean().square() + 1e-10)


def _where(choices: Choices) -> tuple[int, Tensor | None]:
    return choices.probability_TE.shape[1], choices.real_T


def _tokens(choices: Choices) -> Tensor | int:
    return len(choices.probability_TE) if choices.real_T is None else choices.real_T.sum()
