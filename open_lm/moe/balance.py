"""Auxiliary losses of a router. Shapes: T tokens, E experts, K choices per token."""

from torch import Tensor


def load_balancing_loss(logits_TE: Tensor, count_E: Tensor) -> Tensor:
    """E * sum_i f_i P_i, a float32 scalar: 1 when balanced, E when every token goes to one expert.

    f_i is expert i's share of the assignments before anything is dropped, count_E / (K*T), without gradient;
    P_i is its mean probability over the T tokens. 0 for T = 0.
    Source: Switch Transformer (2101.03961), eq. 4-6, with Megatron's and MegaBlocks' normalisation by K.
    """
    T, E = logits_TE.shape
    f_E = count_E.float() / count_E.sum().clamp(min=1)
    P_E = logits_TE.float().softmax(dim=-1).sum(dim=0) / max(T, 1)
    return E * (f_E * P_E).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over T tokens of logsumexp(logits)², a float32 scalar; 0 for T = 0 (ST-MoE, 2202.08906, eq. 5)."""
    T = logits_TE.shape[0]
    return logits_TE.float().logsumexp(dim=-1).square().sum() / max(T, 1)
