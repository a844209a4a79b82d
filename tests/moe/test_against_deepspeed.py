"""Routing, drops and losses against DeepSpeed's gating functions, the whole residual layer against its MoE.

What DeepSpeed gave is in peers/deepspeed.json, written by peers/make_deepspeed.py.
Shapes: T tokens, E experts, R rows, D model width.
"""

import json
from pathlib import Path

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe
from open_lm.moe.capacity import capacity, drop
from open_lm.moe.layer import EPS, MoE
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context, Routing, expert_of_row, normalize
from open_lm.moe.stats import measure

FOUND = json.loads(Path(__file__).with_name("peers").joinpath("deepspeed.json").read_text(encoding="utf-8"))
CASES = FOUND["cases"] + FOUND["tables"]


def flags_of(function: str, options: dict, experts: int) -> MoEConfig:
    """The flags that make ours DeepSpeed's."""
    k = {"top1gating": 1, "top2gating": 2}.get(function) or options["k"]
    dropless = not options.get("drop_tokens", True)
    drop_policy = {
        "top1gating": "random",
        "top2gating": "choice",
        "topkgating": options.get("drop_policy", "probs"),
    }[function]
    noise = "rsample" if options.get("noisy_gate_policy") == "RSample" else "none"
    config = MoEConfig(
        num_experts=experts,
        top_k=k,
        capacity_factor=0.0 if dropless else options["capacity_factor"],
        capacity_rounding="down" if dropless else "up",
        min_capacity=0 if dropless else options["min_capacity"],
        drop_policy="position" if dropless else drop_policy,
        normalize_after_drops=k > 1,
        noise="second_expert" if options.get("top2_2nd_expert_sampling") else noise,
        balance=("aux",) if function == "topkgating" else ("first_choice",),
        loss_weight=1.0,
    )
    check_moe(config)
    return config


def weights_of(routing: Routing) -> torch.Tensor:
    """weight_TE of the kept rows."""
    T, E = routing.logits_TE.shape
    kept = int(routing.count_E.sum())
    place_R = routing.token_R * E + expert_of_row(routing)
    return torch.zeros(T * E).index_add(0, place_R[:kept], routing.weight_R[:kept]).view(T, E)


def slots_of(routing: Routing) -> list[list[int]]:
    """[token, expert, place among the expert's rows] of every kept row, sorted."""
    slots, start = [], 0
    for expert, count in enumerate(routing.count_E.tolist()):
        rows = routing.token_R[start : start + count].tolist()
        slots += [[token, expert, place] for place, token in enumerate(rows)]
        start += count
    return sorted(slots)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_gating(number, monkeypatch):
    case = CASES[number]
    logits_TE = torch.tensor(case["logits"], requires_grad=True)
    config = flags_of(case["function"], case["options"], logits_TE.shape[1])
    context = Context(training=True, capacity=capacity(len(logits_TE), config))
    uniform_TE = torch.tensor(case.get("uniform", [[]]))
    routed = None

    def draw(like: torch.Tensor) -> torch.Tensor:
        """The numbers that DeepSpeed drew: of (token, expert), or of the routing's rows."""
        return uniform_TE if like.ndim == 2 else uniform_TE[routed.token_R, expert_of_row(routed)]

    monkeypatch.setattr(torch, "rand_like", draw)
    routed = top_k(logits_TE, config, context)
    kept = drop(routed, config, context)
    stats = measure(routed, kept, config, context)
    if config.normalize_after_drops:
        kept = normalize(kept, EPS)
    weight_TE = weights_of(kept)

    torch.testing.assert_close(weight_TE, torch.tensor(case["weight"]), atol=1e-6, rtol=1e-5)
    if case["function"] == "top2gating":
        # there second choices lie behind first ones; the order inside an expert changes no result
        assert [s[:2] for s in slots_of(kept)] == [s[:2] for s in case["slots"]]
    else:
        assert slots_of(kept) == case["slots"]
    assert stats.count_E.tolist() == case["exp_counts"]
    torch.testing.assert_close(stats.loss, torch.tensor(case["l_aux"]))
    if "drop_tokens" not in case["options"]:
        assert 0 < stats.dropped < stats.count_E.sum()

    slope_TE = torch.cos(torch.arange(weight_TE.numel()).float()).view_as(weight_TE)
    ((slope_TE * weight_TE).sum() + stats.loss).backward()
    torch.testing.assert_close(logits_TE.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-5)


def test_dispatch_tables_that_deepspeed_writes_by_hand():
    # the tables of its own tests, beside the stored outputs: [token, expert, place]
    wanted = [
        [[0, 1, 0], [1, 0, 0], [1, 1, 1], [2, 2, 0], [2, 3, 0], [3, 2, 1], [3, 3, 1]],
        [[0, 1, 0], [0, 3, 0], [1, 0, 0], [1, 1, 1], [2, 2, 0], [2, 3, 1], [3, 2, 1]],
        [[0, 2, 0], [0, 4, 0], [1, 1, 0], [1, 3, 0], [1, 5, 0], [2, 1, 1], [2, 2, 1], [2, 3, 1], [3, 0, 0],
         [3, 5, 1]],
        [[0, 2, 0], [0, 4, 0], [0, 5, 0], [1, 1, 0], [1, 3, 0], [1, 5, 1], [2, 1, 1], [2, 2, 1], [2, 3, 1],
         [3, 0, 0]],
        [[0, 0, 0], [0, 2, 0], [1, 0, 1], [1, 2, 1], [2, 0, 2], [2, 1, 0], [3, 0, 3], [3, 1, 1]],
    ]  # fmt: skip
    for table, slots in zip(FOUND["tables"], wanted, strict=True):
        logits_TE = torch.tensor(table["logits"])
        config = flags_of(table["function"], table["options"], logits_TE.shape[1])
        context = Context(training=True, capacity=capacity(len(logits_TE), config))
        assert slots_of(drop(top_k(logits_TE, config, context), config, context)) == slots


def matching(layer: MoE, theirs: dict) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Our parameters beside DeepSpeed's (or their gradients) under its names."""
    mlp, mixing = layer.experts.mlp, layer.mixing
    of = {name: torch.tensor(value) for name, value in theirs.items()}

    def stack(name: str) -> torch.Tensor:
        return torch.stack([of[f"deepspeed_moe.experts.deepspeed_experts.{e}.{name}"] for e in range(3)])

    assert mixing.mlp is not None
    assert mixing.coefficient is not None
    assert mlp.b1 is not None
    assert mlp.b2 is not None
    return [
        (layer.router.layer.weight, of["deepspeed_moe.gate.wg.weight"]),
        (mlp.w1, stack("up.weight").transpose(1, 2)),
        (mlp.b1, stack("up.bias")),
        (mlp.w2, stack("down.weight").transpose(1, 2)),
        (mlp.b2, stack("down.bias")),
        (mixing.mlp.w1.weight, of["mlp.up.weight"]),
        (mixing.mlp.w1.bias, of["mlp.up.bias"]),
        (mixing.mlp.w2.weight, of["mlp.down.weight"]),
        (mixing.mlp.w2.bias, of["mlp.down.bias"]),
        (mixing.coefficient.weight, of["coefficient.weight"]),
        (mixing.coefficient.bias, of["coefficient.bias"]),
    ]


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_residual_layer(backend):
    found = FOUND["residual"]
    layer = MoE(
        MoEConfig(
            dim=8,
            hidden_dim=5,
            num_experts=3,
            top_k=2,
            capacity_factor=0.8,
            capacity_rounding="up",
            drop_policy="choice",
            normalize_after_drops=True,
            ffn_type="gelu_exact",
            expert_bias=True,
            output_bias=False,
            residual=True,
            balance=("first_choice",),
            loss_weight=1.0,
            backend=backend,
        )
    )
    pairs = matching(layer, found["weights"])
    assert {id(mine) for mine, _ in pairs} == {id(p) for p in layer.parameters()}
    with torch.no_grad():
        for mine, theirs in pairs:
            mine.copy_(theirs)
    x_BSD = torch.tensor(found["x"], requires_grad=True)
    y_BSD, stats = layer(x_BSD)
    torch.testing.assert_close(y_BSD, torch.tensor(found["y"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.loss, torch.tensor(found["l_aux"]))
    assert stats.count_E.tolist() == found["exp_counts"]
    assert stats.dropped > 0
    slope_BSD = torch.cos(torch.arange(y_BSD.numel()).float()).view_as(y_BSD)
    ((slope_BSD * y_BSD).sum() + stats.loss).backward()
    torch.testing.assert_close(x_BSD.grad, torch.tensor(found["x_gradient"]), atol=1e-5, rtol=1e-5)
    for mine, theirs in matching(layer, found["gradients"]):
        torch.testing.assert_close(mine.grad, theirs, atol=1e-5, rtol=1e-5)
