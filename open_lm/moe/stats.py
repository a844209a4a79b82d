"""What a router did: `RouterStats`, returned by every MoE layer, and how to add, send and read them.

Shapes: T tokens, E experts, K choices per token, L MoE layers, N numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from open_lm.moe.balance import load_balancing_loss, router_z_loss
from open_lm.moe.routing import Routing


class RouterStats(NamedTuple):
    """One MoE layer on one batch, or a sum of such (`add`). Only the two losses carry gradients.

    Every field is a sum, so micro-batches and ranks add up; for a mean loss divide by how many were added.
    """

    balance_loss: Tensor  # scalar: `balance.load_balancing_loss`
    z_loss: Tensor  # scalar: `balance.router_z_loss`
    count_E: Tensor  # assignments to each expert before anything was dropped
    dropped: Tensor  # scalar: assignments dropped
    entropy_sum: Tensor  # scalar, nats: sum over tokens of -sum_e p log p of the router's probabilities
    tokens: Tensor  # scalar: T


def measure(routed: Routing, kept: Routing) -> RouterStats:
    """The RouterStats of a layer, from its Routing before (`routed`) and after (`kept`) dropping; float32."""
    with torch.no_grad():
        log_p_TE = routed.logits_TE.float().log_softmax(dim=-1)
        entropy_sum = (log_p_TE.exp() * -log_p_TE).sum()
        count_E = routed.count_E.float()
        dropped = (routed.count_E - kept.count_E).sum().float()
        tokens = torch.full_like(dropped, routed.logits_TE.shape[0])
    return RouterStats(
        balance_loss=load_balancing_loss(routed.logits_TE, routed.count_E),
        z_loss=router_z_loss(routed.logits_TE),
        count_E=count_E,
        dropped=dropped,
        entropy_sum=entropy_sum,
        tokens=tokens,
    )


def add(a: Sequence[RouterStats], b: Sequence[RouterStats]) -> list[RouterStats]:
    """Layer by layer and field by field, a + b: the statistics of two batches."""
    return [
        RouterStats(*(u + v for u, v in zip(of_a, of_b, strict=True)))
        for of_a, of_b in zip(a, b, strict=True)
    ]


def pack(stats: Sequence[RouterStats]) -> Tensor:
    """All numbers of L layers in one detached float64 tensor (N,), for one all_reduce(SUM)."""
    return torch.cat([field.detach().double().reshape(-1) for layer in stats for field in layer])


def unpack(flat_N: Tensor, like: Sequence[RouterStats]) -> list[RouterStats]:
    """The inverse of `pack`: L layers of float64 fields, shaped as those of `like`."""
    parts = iter(flat_N.split([field.numel() for layer in like for field in layer]))
    return [RouterStats(*(next(parts).reshape(field.shape) for field in layer)) for layer in like]


def summarize(stats: Sequence[RouterStats], layers: Sequence[int]) -> list[dict]:
    """One plain dict per MoE layer, ready for JSON; `layers` are their numbers (`placement.moe_layers`).

    layer: its number. share: each expert's assignments before drops over all assignments, E floats, sum 1.
    entropy: of the router's probabilities in nats, mean over tokens, at most log E. fullest_over_mean: the
    fullest expert's assignments over the mean expert's, 1 when balanced, E when collapsed. dropped_share:
    dropped over all assignments. dead_experts: how many have no assignment. One transfer to the host.
    """
    if not stats:
        return []
    read = unpack(pack(stats).cpu(), stats)
    return [_summarize_one(number, layer) for number, layer in zip(layers, read, strict=True)]


def _summarize_one(number: int, stats: RouterStats) -> dict:
    counts = stats.count_E.tolist()
    assignments = max(sum(counts), 1.0)
    return {
        "layer": number,
        "share": [count / assignments for count in counts],
        "entropy": stats.entropy_sum.item() / max(stats.tokens.item(), 1.0),
        "fullest_over_mean": max(counts) / assignments * len(counts),
        "dropped_share": stats.dropped.item() / assignments,
        "dead_experts": counts.count(0.0),
    }
