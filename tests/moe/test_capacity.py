"""Capacity and drops for any choice of experts, against a definition in plain Python; padding to the capacity.

Shapes: T tokens, B sequences, E experts, K choices per token, R rows, D model width.
"""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.config.moe import MoEConfig
from open_lm.moe.capacity import capacity, drop, drop_by, pad_to_capacity
from open_lm.moe.layer import EPS, MoE, Tokens
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context, Routing, normalize, sort_by_expert

FACTORS = st.integers(1, 32).map(lambda eighths: eighths / 8)


@given(
    tokens=st.integers(0, 5000),
    experts=st.sampled_from([1, 2, 4, 8, 64]),
    data=st.data(),
    factor=FACTORS,
    least=st.integers(0, 9),
)
def test_capacity_is_the_rounded_formula(tokens, experts, data, factor, least):
    k = data.draw(st.integers(1, experts))
    exact = Fraction(factor) * k * tokens / experts
    for rounding, rounded in (("down", math.floor(exact)), ("up", math.ceil(exact))):
        config = MoEConfig(
            num_experts=experts,
            top_k=k,
            capacity_factor=9.0,
            eval_capacity_factor=factor,
            capacity_rounding=rounding,
            min_capacity=least,
        )
        assert capacity(tokens, config, training=False) == min(max(rounded, least), tokens)
        assert (
            capacity(tokens, config) == min(max(9 * k * tokens // experts, least), tokens) or rounding == "up"
        )


def test_evaluation_has_a_factor_of_its_own_or_that_of_training():
    def both(**flags):
        config = MoEConfig(num_experts=4, top_k=2, **flags)
        return capacity(16, config), capacity(16, config, training=False)

    assert both(capacity_factor=1.0) == (8, 8)
    assert both(capacity_factor=1.0, eval_capacity_factor=2.0) == (8, 16)
    assert both(capacity_factor=1.0, eval_capacity_factor=0.0) == (8, 0)
    assert both(capacity_factor=0.0, min_capacity=4) == (0, 0)


@st.composite
def routings(draw):
    """(routing, chosen_TK, weight_TK, B): any distinct experts, weights with many ties."""
    E = draw(st.integers(1, 5))
    K = draw(st.integers(1, E))
    B, S = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    chosen = [draw(st.permutations(range(E)))[:K] for _ in range(B * S)]
    weights = [[draw(st.integers(1, 3)) / 4 for _ in range(K)] for _ in range(B * S)]
    expert_TK = torch.tensor(chosen, dtype=torch.int64).reshape(-1, K)
    weight_TK = torch.tensor(weights).reshape(-1, K)
    routing = sort_by_expert(expert_TK, weight_TK, torch.zeros(B * S, E))
    return routing, chosen, weights, B


def kept_rows(routing: Routing) -> list[set[tuple[int, float]]]:
    """For each expert its kept (token, weight)."""
    found, start = [], 0
    for count in routing.count_E.tolist():
        rows = slice(start, start + count)
        pairs = zip(routing.token_R[rows].tolist(), routing.weight_R[rows].tolist(), strict=True)
        found.append(set(pairs))
        assert len(found[-1]) == count  # no token twice in an expert
        start += count
    return found


# What a policy sorts a row (token, choice, weight) by, the best first; rows come by token, then choice.
ORDERS = {
    "position": lambda row: 0,
    "choice": lambda row: row[1],
    "probs": lambda row: -row[2],
    "random": lambda row: row[1],  # in evaluation
}


@settings(max_examples=150, deadline=None)
@given(
    case=routings(),
    policy=st.sampled_from(sorted(ORDERS)),
    limit=st.integers(1, 6),
    per_sequence=st.booleans(),
)
def test_the_best_rows_stay_and_ties_keep_the_earlier(case, policy, limit, per_sequence):
    routing, chosen, weights, B = case
    T, E = routing.logits_TE.shape
    config = MoEConfig(
        num_experts=E,
        top_k=len(chosen[0]) if chosen else 1,
        drop_policy=policy,
        capacity_per="sequence" if per_sequence else "batch",
    )
    kept = drop(routing, config, Context(capacity=limit, sequences=B))
    groups = B if per_sequence else 1
    wanted = []
    for expert in range(E):
        rows = [(t, k, weights[t][k]) for t in range(T) for k, e in enumerate(chosen[t]) if e == expert]
        stay = []
        for group in range(groups):
            members = [row for row in rows if row[0] // max(T // groups, 1) == group]
            stay += sorted(members, key=ORDERS[policy])[:limit]  # sorted is stable
        wanted.append({(t, w) for t, _, w in stay})
    assert kept_rows(kept) == wanted
    assert kept.token_R.shape == routing.token_R.shape
    assert (kept.weight_R[int(kept.count_E.sum()) :] == 0).all()


@settings(max_examples=60, deadline=None)
@given(case=routings(), limit=st.integers(1, 6))
def test_a_capacity_for_each_sequence(case, limit):
    routing, _, _, B = case
    T = len(routing.logits_TE)
    limits = [limit + b for b in range(B)]
    kept = drop_by(routing, torch.tensor(limits), None, B)
    for before, after in zip(kept_rows(routing), kept_rows(kept), strict=True):
        for b in range(B):

            def of_b(rows, b=b):
                return sorted(row for row in rows if row[0] // max(T // B, 1) == b)

            assert of_b(after) == of_b(before)[: limits[b]]


def test_random_keeps_the_highest_draws_in_training_and_everyone_alike():
    T, E, limit = 2000, 2, 250
    expert_TK = (torch.arange(T) % E)[:, None]
    routing = sort_by_expert(expert_TK, torch.ones(T, 1), torch.zeros(T, E))
    config = MoEConfig(num_experts=E, top_k=1, drop_policy="random")
    torch.manual_seed(0)
    kept = drop(routing, config, Context(training=True, capacity=limit))
    assert kept.count_E.tolist() == [limit, limit]
    early = int((kept.token_R[: 2 * limit] < T // 2).sum())
    # 500 of 2000 without replacement: mean 250, standard deviation 9.7
    assert abs(early - 250) < 4 * 9.7
    again = drop(routing, config, Context(training=True, capacity=limit))
    assert not torch.equal(again.token_R, kept.token_R)
    first = drop(routing, config, Context(training=False, capacity=limit))
    assert (first.token_R[: 2 * limit] < T // 4).all()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 12),
    E=st.integers(2, 6),
    data=st.data(),
    tied=st.booleans(),
    score=st.sampled_from(["softmax", "sigmoid"]),
    scale=st.sampled_from([1.0, 2.5]),
    limit=st.integers(1, 5),
)
def test_weights_add_up(seed, T, E, data, tied, score, scale, limit):
    K = data.draw(st.integers(2, E))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=generator)
    if tied:
        logits_TE = logits_TE.round()
    config = MoEConfig(num_experts=E, top_k=K, score=score, normalize_weights=True, weight_scale=scale)
    routing = top_k(logits_TE, config, Context())
    kept_rows(routing)
    assert routing.row_TK is not None
    sums_T = routing.weight_R[routing.row_TK].sum(dim=1)
    torch.testing.assert_close(sums_T, torch.full((T,), scale))

    config = MoEConfig(num_experts=E, top_k=K, score=score, normalize_after_drops=True)
    kept = normalize(drop(top_k(logits_TE, config, Context()), config, Context(capacity=limit)), EPS)
    assert kept.row_TK is not None
    sums_T = kept.weight_R[kept.row_TK].sum(dim=1)
    has_any_T = (kept.row_TK < kept.count_E.sum()).any(dim=1)
    torch.testing.assert_close(sums_T, has_any_T.float())


PADDED = [
    {},
    {"capacity_per": "sequence"},
    {"drop_policy": "probs", "ffn_type": "swiglu", "expert_bias": True},
    {"capacity_factor": 3.0},
    {"straight_through": True, "normalize_after_drops": True, "drop_policy": "choice"},
    {"min_capacity": 8},
]


def run(layer: MoE, x_BSD: torch.Tensor, tokens: Tokens | None = None) -> dict[str, torch.Tensor]:
    x_BSD = x_BSD.clone().requires_grad_()
    layer.zero_grad()
    y_BSD, stats = layer(x_BSD, tokens)
    ((y_BSD * torch.cos(torch.arange(y_BSD.numel()).float()).view_as(y_BSD)).sum() + stats.loss).backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return found | {"y": y_BSD.detach(), "x": x_BSD.grad, "dropped": stats.dropped}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize("flags", PADDED, ids=lambda flags: " ".join(flags) or "plain")
def test_padding_to_capacity_changes_no_number(flags, backend, masked):
    torch.manual_seed(0)
    flags = {"capacity_factor": 0.7} | flags
    layer = MoE(MoEConfig(dim=8, hidden_dim=6, num_experts=5, backend=backend, **flags))
    padded = MoE(
        MoEConfig(dim=8, hidden_dim=6, num_experts=5, backend=backend, pad_to_capacity=True, **flags)
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    padded.load_state_dict(layer.state_dict())
    x_BSD = torch.randn(3, 7, 8)
    tokens = Tokens(real=torch.rand(3, 7) < 0.7) if masked else None
    ours, wanted = run(padded, x_BSD, tokens), run(layer, x_BSD, tokens)
    assert (wanted["dropped"] > 0) == (flags["capacity_factor"] < 1) or masked
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_padded_rows_are_exactly_the_capacity():
    routing = drop_by(top_k(torch.randn(20, 4), MoEConfig(num_experts=4, top_k=2), Context()), 9)
    padded = pad_to_capacity(routing, 9)
    assert padded.count_E.tolist() == [9] * 4
    assert padded.token_R.shape == padded.weight_R.shape == (36,)
    assert int((padded.weight_R > 0).sum()) == int(routing.count_E.sum())
