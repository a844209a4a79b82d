"""How many rows an expert takes, and which it keeps. Capacity is a function from Routing to Routing.

Shapes: T tokens, B sequences, E experts, K choices per token, R rows, C capacity.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import EXPERTS_CHOOSE
from open_lm.moe.routing import Context, Routing, expert_of_row, invert, keep


def capacity(tokens: int, config: MoEConfig, *, training: bool = True) -> int:
    """The most rows that an expert takes out of `tokens`: factor * k*T/E, rounded, at least min_capacity.

    0 means that nothing is dropped, as in MegaBlocks: with --moe-capacity-factor 0, and where the formula gives
    0 (a token at a time, in generation). Computed in float64 as MegaBlocks and Megatron do; DeepSpeed's float32
    gives one row more or less at some factors that are no sums of powers of two.
    """
    assert isinstance(config.num_experts, int)
    factor = _factor(config, training)
    if not factor:
        return 0
    rounded = {"down": math.floor, "up": math.ceil}[config.capacity_rounding]
    places = rounded(factor * (config.top_k * tokens / config.num_experts))
    return min(max(places, config.min_capacity), tokens)


def by_position(routing: Routing, context: Context) -> Tensor | None:
    """First come, first served: by token, then choice, which is the rows' own order (MegaBlocks)."""
    return None


def by_choice(routing: Routing, context: Context) -> Tensor:
    """All first choices before all second ones, then by token (GShard, 2006.16668; DeepSpeed; ST-MoE)."""
    return -_choice_of_row(routing).float()


def by_probs(routing: Routing, context: Context) -> Tensor:
    """The largest weights stay, at equal weights the first (Megatron's `probs`)."""
    return routing.weight_R.detach()


def by_chance(routing: Routing, context: Context) -> Tensor:
    """DeepSpeed's random token selection: whoever draws high numbers; in evaluation `by_choice`."""
    if not context.training:
        return by_choice(routing, context)
    return torch.rand_like(routing.weight_R)


# --moe-drop-policy → (routing, context) → priority of each row, None: the order as it is
POLICIES: dict[str, Callable[[Routing, Context], Tensor | None]] = {
    "position": by_position,
    "choice": by_choice,
    "probs": by_probs,
    "random": by_chance,
}


def drop(routing: Routing, config: MoEConfig, context: Context) -> Routing:
    """Each expert keeps `context.capacity` rows by --moe-drop-policy, of the batch or of each sequence.

    Experts that choose have filled themselves. Dropped in order once more, they would show a token whether those
    of other sequences were taken at later positions, and so what its own sequence has there.
    """
    if not context.capacity or config.router in EXPERTS_CHOOSE:
        return routing
    sequences = context.sequences if config.capacity_per == "sequence" else 1
    limit = context.capacity if context.real_T is None else _capacity_of_real(context, config, sequences)
    priority_R = POLICIES[config.drop_policy](routing, context)
    return drop_by(routing, limit, priority_R, sequences)


def drop_by(
    routing: Routing, capacity: int | Tensor, priority_R: Tensor | None = None, sequences: int = 1
) -> Routing:
    """Each expert keeps the `capacity` rows of highest priority out of each of the batch's `sequences`.

    At equal priority, and without any, the earlier row stays. R stays as it is; dropped rows go to the end.
    `capacity` is one number, or capacity_B of the sequences.
    """
    R, E = routing.token_R.numel(), routing.count_E.numel()
    row_R = torch.arange(R, device=routing.token_R.device)
    group_R = expert_of_row(routing)
    limit_R = capacity
    if sequences > 1:
        sequence_R = routing.token_R // (routing.logits_TE.shape[0] // sequences)
        group_R = group_R * sequences + sequence_R
        limit_R = capacity[sequence_R] if isinstance(capacity, Tensor) else capacity
    there_R = row_R < routing.count_E.sum()
    group_R = torch.where(there_R, group_R, E * sequences)  # dropped before: a group of their own
    if priority_R is None:
        rank_R = row_R - torch.searchsorted(group_R, group_R)  # the groups are in order already
    else:
        order_R = priority_R.sort(descending=True, stable=True).indices
        order_R = order_R[group_R[order_R].sort(stable=True).indices]
        sorted_R = group_R[order_R]
        rank_R = (row_R - torch.searchsorted(sorted_R, sorted_R))[invert(order_R)]
    return keep(routing, (rank_R < limit_R) & there_R)


def pad_to_capacity(routing: Routing, capacity: int) -> Routing:
    """Every expert with exactly `capacity` rows: the missing ones read token 0 and have weight 0.

    R becomes E * capacity, so the shapes of the products do not depend on the routing. Needs a routing whose
    experts have at most `capacity` rows.
    """
    E = routing.count_E.numel()
    start_E = routing.count_E.cumsum(0) - routing.count_E
    place_C = torch.arange(capacity, device=start_E.device)
    filled_EC = place_C < routing.count_E[:, None]
    row_EC = torch.where(filled_EC, start_E[:, None] + place_C, 0)
    filled_R, row_R = filled_EC.flatten(), row_EC.flatten()
    scale_R = routing.input_weight_R
    return routing._replace(
        token_R=torch.where(filled_R, routing.token_R[row_R], 0),
        weight_R=torch.where(filled_R, routing.weight_R[row_R], 0.0),
        count_E=torch.full_like(routing.count_E, capacity).reshape(E),
        row_TK=None,
        input_weight_R=None if scale_R is None else torch.where(filled_R, scale_R[row_R], 1.0),
        rows_per_expert=capacity,
    )


def fullest(context: Context, config: MoEConfig) -> int:
    """The most rows that `drop` may leave an expert (of one sequence, with --moe-capacity-per sequence).

    That is the capacity, but where padding leaves so few real tokens that the formula gives 0 for them.
    """
    assert isinstance(config.num_experts, int)
    if context.real_T is None or config.min_capacity or config.capacity_rounding == "up":
        return context.capacity
    sequences = context.sequences if config.capacity_per == "sequence" else 1
    tokens = context.real_T.numel() // max(sequences, 1)
    few = int(config.num_experts / (config.top_k * _factor(config, context.training)))
    return max(context.capacity, min(few, tokens))


def _factor(config: MoEConfig, training: bool) -> float:
    chosen = config.capacity_factor if training else config.eval_capacity_factor
    return config.capacity_factor if chosen is None else chosen


def _capacity_of_real(context: Context, config: MoEConfig, sequences: int) -> Tensor:
    """capacity_B, int64: `capacity` of each sequence's real tokens, without asking the device how many.

    So a batch with padding drops what the batch without it would.
    """
    assert isinstance(config.num_experts, int)
    assert context.real_T is not None
    n_B = context.real_T.view(sequences, -1).sum(dim=1)
    # in float64 and in the order of `capacity`, so that both round alike
    exact_B = _factor(config, context.training) * (config.top_k * n_B.double() / config.num_experts)
    places_B = {"down": exact_B.floor, "up": exact_B.ceil}[config.capacity_rounding]().long()
    places_B = places_B.clamp(min=config.min_capacity)
    return torch.where(places_B == 0, n_B, places_B)  # 0: nothing is dropped


def _choice_of_row(routing: Routing) -> Tensor:
    """choice_R, int64: 0 for a row that is its token's first choice."""
    row_TK = routing.row_TK
    assert row_TK is not None, "tokens choose in no order here"
    choice_TK = torch.arange(row_TK.shape[1], device=row_TK.device).expand_as(row_TK)
    return torch.empty_like(routing.token_R).scatter(0, row_TK.flatten(), choice_TK.flatten())
