"""What a router did: `RouterStats`, returned by every MoE layer, and how to add, send and read them.

Shapes: T tokens, E experts, K choices per token, L MoE layers, N numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.moe.balance import LOSSES, Choices, count, router_z_loss, switch_loss
from open_lm.moe.routing import Context, Routing


class RouterStats(NamedTuple):
    """One MoE layer on one batch, or a sum of such (`add`); padding is in none of it.

    Every field is a sum, so micro-batches and ranks add up; for a mean loss divide by how many were added.
    Only `loss` and `probability_E` carry gradients.
    """

    loss: Tensor  # scalar: the layer's weighted balancing losses and z-loss, for the objective
    balance_loss: Tensor  # scalar: `balance.switch_loss`, whatever --moe-balance is: for people
    z_loss: Tensor  # scalar: `balance.router_z_loss`
    count_E: Tensor  # assignments to each expert before anything was dropped
    choice_count_E: Tensor  # the same by the router's scores alone, without bias and groups
    probability_E: Tensor  # sums over tokens of the router's probabilities
    dropped: Tensor  # scalar: assignments dropped
    entropy_sum: Tensor  # scalar, nats: sum over tokens of -sum_e p log p of the router's probabilities
    tokens: Tensor  # scalar: T


def measure(routed: Routing, kept: Routing, config: MoEConfig, context: Context) -> RouterStats:
    """The RouterStats of a layer, from its Routing before (`routed`) and after (`kept`) dropping; float32."""
    real_T = context.real_T
    p_TE = routed.probability_TE
    if p_TE is None:
        p_TE = routed.logits_TE.float().softmax(dim=-1)
    if real_T is not None:
        p_TE = p_TE * real_T[:, None]
    count_E = routed.count_E.float()
    tokens = torch.full_like(count_E[0], len(p_TE)) if real_T is None else real_T.sum().float()
    probability_E = p_TE.sum(dim=0)
    choice_count_E = count_E
    loss = config.z_loss_weight * (z_loss := router_z_loss(routed.logits_TE, real_T))
    if routed.choice_TK is not None:
        if not _by_score_alone(config, context):
            choice_count_E = count(routed.choice_TK, p_TE.shape[1], real_T)
        choices = Choices(p_TE, routed.choice_TK, choice_count_E, real_T, context.sequences)
        for name, weight in config.losses.items():
            loss = loss + weight * LOSSES[name](choices)
    with torch.no_grad():
        entropy_sum = torch.special.entr(p_TE).sum()
        balance_loss = switch_loss(choice_count_E, probability_E, tokens)
        dropped = (routed.count_E.sum() - kept.count_E.sum()).float()
    return RouterStats(
        loss=loss,
        balance_loss=balance_loss,
        z_loss=z_loss.detach(),
        count_E=count_E,
        choice_count_E=choice_count_E,
        probability_E=probability_E,
        dropped=dropped,
        entropy_sum=entropy_sum,
        tokens=tokens,
    )


def _by_score_alone(config: MoEConfig, context: Context) -> bool:
    """Whether a token goes to just the experts that it scores highest, so that these need no second count."""
    return config.router == "top_k" and context.bias_E is None and config.num_groups == 1


def router_loss(
    stats: Sequence[RouterStats], config: MoEConfig, counts: Sequence[Tensor] | None = None
) -> Tensor:
    """What the router adds to the objective: the mean over MoE layers of their losses, a float32 scalar.

    `counts`, one (E,) per layer, are the `choice_count_E` of the whole batch so far, over ranks and micro-batches,
    for --moe-balance global; without them it counts what `stats` have counted.
    """
    loss = torch.stack([layer.loss for layer in stats]).mean()
    weight = config.losses.get("global", 0.0)
    if counts is None or not weight:
        return loss
    # linear in the counts: what each layer has added with its own is taken back
    corrections = [
        switch_loss(everyones_E, layer.probability_E, layer.tokens)
        - switch_loss(layer.choice_count_E, layer.probability_E, layer.tokens)
        for layer, everyones_E in zip(stats, counts, strict=True)
    ]
    return loss + weight * torch.stack(corrections).mean()


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
