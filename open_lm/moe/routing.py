"""`Routing`, the one type between a router and the experts, and the functions that make and shorten it.

Shapes: T tokens, E experts, K choices per token, R = T*K assignments ("rows").
Everything here is sort, cumsum and gather of static shapes: no host sync, so it compiles and it never waits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Which token goes to which expert with what weight: R rows, those of expert 0 first, then of expert 1 …

    The first sum(count_E) rows are computed; the rows behind them were dropped and have weight 0.
    """

    token_R: Tensor  # int64: the token that is this row's input and to which its output is added
    weight_R: Tensor  # float32: the combine weight; it carries the router's gradient
    count_E: Tensor  # int64: rows of each expert
    logits_TE: Tensor  # float32: the router's scores, for the auxiliary losses
    row_TK: Tensor | None  # int64: the rows of each token, or None if tokens differ in how many they have


def sort_by_expert(expert_TK: Tensor, weight_TK: Tensor, logits_TE: Tensor) -> Routing:
    """The Routing of K choices per token: rows sorted by expert, within an expert by token, then choice."""
    (T, K), E = expert_TK.shape, logits_TE.shape[1]
    # A radix sort, as on a GPU, takes fewer passes over 16 bits than over 64.
    expert_R, order_R = expert_TK.flatten().to(torch.int16).sort(stable=True)
    experts = torch.arange(E, device=expert_R.device, dtype=torch.int16)
    end_E = torch.searchsorted(expert_R, experts, right=True)
    return Routing(
        token_R=order_R // K,
        weight_R=weight_TK.flatten().gather(0, order_R),
        count_E=end_E.diff(prepend=end_E.new_zeros(1)),
        logits_TE=logits_TE,
        row_TK=invert(order_R).view(T, K),
    )


def drop_by_position(routing: Routing, capacity: int) -> Routing:
    """Keep the first `capacity` rows of each expert, in token order; the others go to the end with weight 0.

    R stays as it is (a static shape); count_E becomes min(count_E, capacity). Source: GShard (2006.16668),
    with MegaBlocks' order: by token, not by choice.
    """
    row_R = torch.arange(routing.token_R.numel(), device=routing.token_R.device)
    end_E = routing.count_E.cumsum(0)
    expert_R = torch.searchsorted(end_E, row_R, right=True).clamp(max=routing.count_E.numel() - 1)
    position_R = row_R - (end_E - routing.count_E)[expert_R]
    kept_R = (position_R < capacity) & (row_R < end_E[-1])

    # Kept rows close ranks, dropped rows follow them: each row's new place, by counting instead of sorting.
    kept_before_R = kept_R.cumsum(0) - kept_R.long()
    place_R = torch.where(kept_R, kept_before_R, kept_R.sum() + row_R - kept_before_R)
    order_R = invert(place_R)
    return Routing(
        token_R=routing.token_R[order_R],
        weight_R=torch.where(kept_R, routing.weight_R, 0.0).gather(0, order_R),
        count_E=routing.count_E.clamp(max=capacity),
        logits_TE=routing.logits_TE,
        row_TK=None if routing.row_TK is None else place_R[routing.row_TK],
    )


def invert(permutation_R: Tensor) -> Tensor:
    """The inverse of a permutation of 0…R-1."""
    rows_R = torch.arange(permutation_R.numel(), device=permutation_R.device)
    return torch.empty_like(permutation_R).scatter_(0, permutation_R, rows_R)
