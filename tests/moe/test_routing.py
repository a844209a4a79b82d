"""The Routing type: a literal table, and properties of sorting and dropping for any choice of experts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.config.moe import MoEConfig
from open_lm.moe.capacity import capacity, drop_by
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context, Routing, sort_by_expert


def test_four_tokens_by_hand():
    expert_TK = torch.tensor([[2, 0], [2, 1], [0, 2], [2, 0]])
    weight_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]])
    routing = sort_by_expert(expert_TK, weight_TK, torch.zeros(4, 3))
    assert routing.token_R.tolist() == [0, 2, 3, 1, 0, 1, 2, 3]
    torch.testing.assert_close(routing.weight_R, torch.tensor([0.2, 0.5, 0.8, 0.4, 0.1, 0.3, 0.6, 0.7]))
    assert routing.count_E.tolist() == [3, 1, 4]
    assert routing.row_TK is not None
    assert routing.row_TK.tolist() == [[4, 0], [5, 3], [1, 6], [7, 2]]

    kept = drop_by(routing, 2)
    assert kept.token_R.tolist() == [0, 2, 1, 0, 1, 3, 2, 3]
    torch.testing.assert_close(kept.weight_R, torch.tensor([0.2, 0.5, 0.4, 0.1, 0.3, 0.0, 0.0, 0.0]))
    assert kept.count_E.tolist() == [2, 1, 2]


@st.composite
def choices(draw):
    """(expert_TK, E, capacity): any tokens, each with K distinct experts."""
    E = draw(st.integers(1, 6))
    K = draw(st.integers(1, E))
    rows = draw(st.lists(st.permutations(range(E)), max_size=12))
    expert_TK = torch.tensor([row[:K] for row in rows], dtype=torch.int64).reshape(-1, K)
    return expert_TK, E, draw(st.integers(0, 8))


def rows_by_expert(routing: Routing) -> list[list[tuple[int, float]]]:
    pairs = list(zip(routing.token_R.tolist(), routing.weight_R.tolist(), strict=True))
    return [list(part) for part in split(pairs, routing.count_E.tolist())]


def split(items: list, counts: list[int]):
    for count in counts:
        yield items[:count]
        items = items[count:]


@settings(max_examples=150, deadline=None)
@given(choices())
def test_sorting_and_dropping(case):
    expert_TK, E, limit = case
    T, K = expert_TK.shape
    # A weight names its assignment, so that a row with another's weight is seen.
    weight_TK = 1 + torch.arange(T * K, dtype=torch.float32).reshape(T, K)
    weight_TK.requires_grad_()
    routing = sort_by_expert(expert_TK, weight_TK, torch.zeros(T, E))
    kept = drop_by(routing, limit)

    wanted = [
        [(t, weight_TK[t, k].item()) for t in range(T) for k in range(K) if expert_TK[t, k] == e]
        for e in range(E)
    ]
    assert rows_by_expert(routing) == wanted
    assert rows_by_expert(kept) == [rows[:limit] for rows in wanted]

    # Nothing is lost or doubled, and a token finds its rows, dropped ones too.
    tokens = [t for t in range(T) for _ in range(K)]
    for each in (routing, kept):
        assert sorted(each.token_R.tolist()) == tokens
        assert each.row_TK is not None
        assert each.token_R[each.row_TK].flatten().tolist() == tokens
    assert (kept.weight_R[int(kept.count_E.sum()) :] == 0).all()

    # The gradient of a kept row's weight reaches exactly its choice; dropped choices get zero.
    slope_R = torch.arange(1.0, T * K + 1)
    (kept.weight_R * slope_R).sum().backward()
    assert weight_TK.grad is not None
    wanted_TK = torch.zeros(T * K)
    for row, weight in enumerate(kept.weight_R.tolist()):
        if weight:
            wanted_TK[int(weight) - 1] = slope_R[row]
    assert weight_TK.grad.flatten().tolist() == wanted_TK.tolist()

    # Dropping again with the same capacity changes nothing; a smaller one drops on.
    again = drop_by(kept, limit)
    assert rows_by_expert(again) == rows_by_expert(kept)
    assert rows_by_expert(drop_by(kept, limit // 2)) == [rows[: limit // 2] for rows in wanted]


def test_top_k_weights_are_the_probabilities():
    logits_TE = torch.sin(1 + 4 * torch.arange(16.0)[:, None] + torch.arange(4.0))
    wanted = {
        False: [0.33500656485557556, 0.4670899212360382],
        True: [0.41766366362571716, 0.5823363065719604],
    }
    for normalize, weights in wanted.items():
        routing = top_k(logits_TE, MoEConfig(num_experts=4, top_k=2, normalize_weights=normalize), Context())
        assert routing.row_TK is not None
        # moe_golden.json, probs_t1_pre and probs_t1_post: token 1 goes to experts 2 and 3.
        of_token_1 = routing.weight_R[routing.row_TK[1]].sort().values
        torch.testing.assert_close(of_token_1, torch.tensor(weights))
        assert routing.count_E.tolist() == [7, 7, 9, 9]


def test_capacity_is_int_of_factor_k_t_over_e():
    # moe_golden.json: capacity_cf1.25 is 10 for T 16, E 4, k 2; MegaBlocks' int(1.25 * 2 * T / 8).
    for factor, experts, tokens, wanted in [
        (1.25, 4, 16, 10),
        (1.25, 8, 2049, 640),
        (0.5, 4, 16, 4),
        (0.0, 8, 2048, 0),
        (1.25, 8, 1, 0),
    ]:
        assert capacity(tokens, MoEConfig(num_experts=experts, top_k=2, capacity_factor=factor)) == wanted
