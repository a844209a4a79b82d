"""`Routing`, the one type between a router and the experts, and the functions that make and change it.

Shapes: T tokens, E experts, K choices per token, R assignments ("rows"; T*K where every token has K).
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
    logits_TE: Tensor  # float32: the router's scores before softmax or sigmoid, for the z-loss
    row_TK: Tensor | None = (
        None  # int64: the rows of each token, or None if tokens differ in how many they have
    )
    probability_TE: Tensor | None = None
    # float32, sums to one per token: what the balancing losses act on; None: the softmax of the logits
    choice_TK: Tensor | None = None
    # int64: the experts that a token chooses, best first, before bias, groups and drops: what those losses count;
    # None: the rows themselves, as far as they are in no order of preference
    input_weight_R: Tensor | None = None  # float32: multiplies each row's input; None: ones
    rows_per_expert: int = 0  # R / E, known to the host, where every expert has as many; 0: they differ


class Context(NamedTuple):
    """What a router may know beside the logits. Tokens are numbered sequence by sequence: T = B * S."""

    training: bool = False
    """Noise and other measures against collapse belong to training alone."""
    sequences: int = 1
    """B: token t is at position t % S of sequence t // S."""
    capacity: int = 0
    """The most rows of an expert (of one sequence, with --moe-capacity-per sequence); 0: no limit."""
    real_T: Tensor | None = None
    """bool: False for padding, which must take no place from others. None: all are real."""
    bias_E: Tensor | None = None
    """float32: added to the scores for the selection alone (--moe-balance bias)."""
    id_T: Tensor | None = None
    """int64: token ids, where the layer is told them."""


def sort_by_expert(
    expert_TK: Tensor, weight_TK: Tensor, logits_TE: Tensor, kernels: bool = False, **more: Tensor | None
) -> Routing:
    """The Routing of K choices per token: rows sorted by expert, within an expert by token, then choice.

    `kernels`: by the Triton backend's kernels, where there is a GPU. `more` are Routing's other fields.
    """
    (T, K), E = expert_TK.shape, logits_TE.shape[1]
    if kernels and expert_TK.is_cuda:
        from open_lm.moe.backends.triton.sorting import sort_rows

        token_R, order_R, row_TK, count_E = sort_rows(expert_TK, E)
        weight_R = weight_TK.flatten().gather(0, order_R)
        return Routing(token_R, weight_R, count_E, logits_TE, row_TK, **more)  # type: ignore[arg-type]
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
        **more,  # type: ignore[arg-type]
    )


def expert_of_row(routing: Routing) -> Tensor:
    """expert_R, int64: each row's expert; that of the dropped rows, which have none, is the last."""
    row_R = torch.arange(routing.token_R.numel(), device=routing.token_R.device)
    end_E = routing.count_E.cumsum(0)
    return torch.searchsorted(end_E, row_R, right=True).clamp(max=routing.count_E.numel() - 1)


def keep(routing: Routing, kept_R: Tensor) -> Routing:
    """Only the rows where kept_R (bool) holds, in their order; the others go to the end with weight 0.

    R stays as it is (a static shape). Rows that were dropped before must not be kept.
    """
    # Kept rows close ranks, dropped rows follow them: each row's new place, by counting instead of sorting.
    kept_before_R = kept_R.cumsum(0) - kept_R.long()
    row_R = torch.arange(kept_R.numel(), device=kept_R.device)
    place_R = torch.where(kept_R, kept_before_R, kept_R.sum() + row_R - kept_before_R)
    order_R = invert(place_R)
    # counted from the running sum, at the experts' ends: no atomics
    kept_until_R1 = torch.cat((kept_before_R, kept_R.sum()[None]))
    end_E = routing.count_E.cumsum(0)
    scale_R = routing.input_weight_R
    return routing._replace(
        token_R=routing.token_R[order_R],
        weight_R=torch.where(kept_R, routing.weight_R, 0.0).gather(0, order_R),
        count_E=kept_until_R1[end_E].diff(prepend=end_E.new_zeros(1)),
        row_TK=None if routing.row_TK is None else place_R[routing.row_TK],
        input_weight_R=None if scale_R is None else scale_R.gather(0, order_R),
        rows_per_expert=0,
    )


def normalize(routing: Routing, eps: float) -> Routing:
    """Each token's weights divided by their sum, at least eps. Needs row_TK."""
    row_TK = routing.row_TK
    assert row_TK is not None
    sum_T = routing.weight_R[row_TK].sum(dim=1).clamp(min=eps)
    return routing._replace(weight_R=routing.weight_R / sum_T[routing.token_R])


def invert(permutation_R: Tensor) -> Tensor:
    """The inverse of a permutation of 0…R-1."""
    rows_R = torch.arange(permutation_R.numel(), device=permutation_R.device)
    return torch.empty_like(permutation_R).scatter(0, permutation_R, rows_R)
