"""Routers against what st-moe-pytorch and Megatron-LM gave (tests/moe/peers) and against numbers by hand."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.moe import MoE, Tokens
from open_lm.moe.balance import Choices, count, first_choice, router_z_loss
from open_lm.moe.routers import ROUTERS
from open_lm.moe.routers.quantile import prices
from open_lm.moe.routers.sinkhorn import plan
from open_lm.moe.routing import Context, Routing, expert_of_row

PEERS = Path(__file__).with_name("peers")
INPUTS = runpy.run_path(str(PEERS / "inputs.py"))
ST_MOE = INPUTS["ST_MOE"]
ST_MOE_GAVE = json.loads((PEERS / "st_moe.json").read_text())
MEGATRON_GAVE = json.loads((PEERS / "megatron_routers.json").read_text())
GOLDEN_TE = torch.sin(1 + 4 * torch.arange(16.0)[:, None] + torch.arange(4.0))


def close(ours, theirs, atol=2e-5, rtol=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(ours, dtype=torch.float32),
        torch.as_tensor(theirs, dtype=torch.float32),
        atol=atol,
        rtol=rtol,
    )


def experts_of(routing: Routing, tokens: int) -> list[list[int]]:
    """Each token's experts, ascending, of the rows that were not dropped."""
    found: list[list[int]] = [[] for _ in range(tokens)]
    rows = int(routing.count_E.sum())
    pairs = zip(routing.token_R.tolist()[:rows], expert_of_row(routing).tolist()[:rows], strict=True)
    for token, expert in pairs:
        found[token].append(expert)
    return [sorted(experts) for experts in found]


def st_moe_layer(case, given) -> MoE:
    """Our layer with the peer's weights. Its factor is ours times K; its multiplicative bias goes into w2."""
    layer = MoE(
        MoEConfig(
            dim=case.dim,
            num_experts=case.experts,
            top_k=case.k,
            hidden_dim=given["between"].shape[1],
            router="coordinate_descent" if case.differentiable else "threshold",
            threshold=case.threshold,
            straight_through=True,
            capacity_factor=case.factor / case.k,
            min_capacity=4,
            capacity_per="sequence",
            drop_policy="choice",
            ffn_type="geglu",
            expert_bias=True,
            output_bias=False,
            balance=("first_choice",),
            loss_weight=0.01,
            z_loss_weight=0.001,
        )
    ).train(case.training)
    mlp = layer.experts.mlp
    copies = {
        layer.router.layer.weight: given["gate"],
        mlp.w1: given["in"].chunk(2, dim=1)[1].transpose(1, 2),
        mlp.v1: given["in"].chunk(2, dim=1)[0].transpose(1, 2),
        mlp.b1: given["in_bias"].chunk(2, dim=1)[1],
        mlp.c1: given["in_bias"].chunk(2, dim=1)[0],
        mlp.w2: given["out"].transpose(1, 2) * given["between"][:, :, None],
        mlp.b2: given["out_bias"],
    }
    for parameter, value in copies.items():
        parameter.data.copy_(value)
    return layer


@pytest.mark.parametrize("name", ST_MOE)
def test_the_whole_layer_is_st_moe_pytorchs(name, monkeypatch):
    case, theirs = ST_MOE[name], ST_MOE_GAVE[name]
    given = INPUTS["st_moe_inputs"](case)
    layer = st_moe_layer(case, given)
    draw_TK = given["draw"].flatten(0, 1)
    monkeypatch.setattr(torch, "rand_like", lambda like: draw_TK.view_as(like))
    x = given["x"].requires_grad_()
    y, stats = layer(x)
    close(y.detach(), theirs["y"])

    # In evaluation it has no losses.
    loss = torch.zeros(())
    if case.training:
        balance, all_kept = balance_of_kept_first_choices(layer, x, case)
        loss = 0.01 * balance + 0.001 * router_z_loss(layer.router(x.flatten(0, 1)))
        close(stats.z_loss, theirs["z"])
        close(balance.detach(), theirs["balance"])
        close(loss.detach(), theirs["total"])
        if all_kept and case.sequences == 1:
            close(stats.loss.detach(), theirs["total"])
    ((y * given["slope"]).sum() + loss).backward()
    assert layer.router.layer.weight.grad is not None
    assert layer.experts.mlp.w2.grad is not None
    assert x.grad is not None
    close(x.grad, theirs["gradient_of_x"])
    close(layer.router.layer.weight.grad, theirs["gradient_of_gate"], atol=1e-4)
    ours = layer.experts.mlp.w2.grad[-1] * given["between"][-1][:, None]
    close(ours.T, theirs["gradient_of_last_out"], atol=1e-4)


def balance_of_kept_first_choices(layer: MoE, x_BSD: torch.Tensor, case) -> tuple[torch.Tensor, bool]:
    """st-moe-pytorch's balancing loss, and whether it is the mean of our `first_choice` of each sequence.

    That is so where no first choice was dropped: its counts are a view of the mask that capacity then changes in
    place, while mesh-tensorflow, which it follows, and we count before drops.
    """
    limit = max(min(case.length, int(case.length * case.factor / case.experts)), 4)
    losses, all_kept = [], True
    for x_SD in x_BSD:
        p_TE = layer.router(x_SD).softmax(-1)
        choice_TK = p_TE.topk(case.k).indices
        first_E = count(choice_TK[:, :1], case.experts, None)
        losses.append(case.experts * (first_E.clamp(max=limit) * p_TE.mean(dim=0)).sum() / case.length)
        if (first_E <= limit).all():
            ours = first_choice(Choices(p_TE, choice_TK, count(choice_TK, case.experts, None), None, 1))
            close(losses[-1].detach(), ours.detach())
        else:
            all_kept = False
    return torch.stack(losses).mean(), all_kept


def test_the_cases_remove_and_drop():
    """Else the comparison above would not see thresholds or capacity."""
    removed, dropped = {}, {}
    for name, case in ST_MOE.items():
        given = INPUTS["st_moe_inputs"](case)
        layer = st_moe_layer(case, given)
        _, stats = layer(given["x"])
        removed[name] = int(case.sequences * case.length * case.k - stats.count_E.sum())
        dropped[name] = int(stats.dropped)
    assert min(removed.values()) > 0, removed
    assert sum(number > 0 for number in dropped.values()) >= 3, dropped


def test_sinkhorn_golden_values():
    # megatron-core on the same logits: moe_golden.json, sinkhorn_row0 and sinkhorn_top2_counts
    wanted_E = [0.02103126235306263, 0.02554107829928398, 0.01187843456864357, 0.004050669725984335]
    close(plan(GOLDEN_TE)[0].exp(), wanted_E, rtol=1e-3)
    config = MoEConfig(num_experts=4, router="sinkhorn")
    assert ROUTERS["sinkhorn"](GOLDEN_TE, config, Context(training=True)).count_E.tolist() == [7, 9, 9, 7]
    # in evaluation plain top-k
    assert ROUTERS["sinkhorn"](GOLDEN_TE, config, Context()).count_E.tolist() == [7, 7, 9, 9]


@pytest.mark.parametrize("name", MEGATRON_GAVE)
def test_sinkhorn_and_quantile_are_megatrons(name):
    tokens, experts, k = map(int, name.split())
    theirs = MEGATRON_GAVE[name]
    logits_TE = INPUTS["megatron_logits"](tokens, experts)
    theirs_TE = torch.tensor(theirs["sinkhorn"])
    # it stops at a tolerance, we after a number of iterations
    close(plan(logits_TE).exp(), theirs_TE, rtol=1e-3, atol=1e-6)
    config = MoEConfig(num_experts=experts, top_k=k, router="sinkhorn")
    routing = ROUTERS["sinkhorn"](logits_TE, config, Context(training=True))
    assert experts_of(routing, tokens) == theirs_TE.topk(k).indices.sort(dim=1).values.tolist()

    close(prices(logits_TE, k), theirs["quantile_price"], atol=1e-6)
    config = MoEConfig(num_experts=experts, top_k=k, router="quantile")
    routing = ROUTERS["quantile"](logits_TE, config, Context())
    # Settled prices tie some tokens' last expert with the next one, where topk, theirs, takes either.
    bid_TE = logits_TE - torch.tensor(theirs["quantile_price"])
    best = bid_TE.topk(k + 1).values
    clear = ((best[:, k - 1] - best[:, k]) > 1e-5).tolist()
    assert sum(clear) > tokens / 2
    chosen = experts_of(routing, tokens)
    for ours, wanted, is_clear, bid_E in zip(chosen, theirs["quantile_experts"], clear, bid_TE, strict=True):
        if is_clear:
            assert ours == wanted
        else:
            close(bid_E[ours].sum(), bid_E[wanted].sum(), atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_plan_gives_tokens_and_experts_their_shares(scale):
    logits_TE = scale * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    plan_TE = plan(logits_TE).exp()
    close(plan_TE.sum(dim=0), [1 / 5] * 5, rtol=1e-5)
    if scale < 10:
        close(plan_TE.sum(dim=1), [1 / 40] * 40, rtol=2e-3)
    # with padding, real tokens are planned as if it were not there
    padded_TE = torch.cat((logits_TE, logits_TE[:7] + 3))
    close(plan(padded_TE, torch.arange(47) < 40)[:40].exp(), plan_TE)


def test_sinkhorn_weights():
    for k, wanted_TE in [(1, GOLDEN_TE.sigmoid()), (2, GOLDEN_TE.softmax(-1))]:
        config = MoEConfig(num_experts=4, top_k=k, router="sinkhorn")
        routing = ROUTERS["sinkhorn"](GOLDEN_TE, config, Context())
        assert routing.row_TK is not None
        close(routing.weight_R[routing.row_TK[:, 0]], wanted_TE.max(-1).values)


def test_expert_choice_by_hand():
    p_TE = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    logits_TE = p_TE.log()
    config = MoEConfig(num_experts=2, top_k=1, router="expert_choice", weight_scale=2.0)
    routing = ROUTERS["expert_choice"](logits_TE, config, Context(capacity=2))
    assert routing.token_R.tolist() == [1, 2, 0, 3]
    close(routing.weight_R, [1.6, 1.4, 1.8, 0.8])
    # of each sequence: tokens 0 and 1, tokens 2 and 3
    config = MoEConfig(num_experts=2, top_k=1, router="expert_choice", capacity_per="sequence")
    routing = ROUTERS["expert_choice"](logits_TE, config, Context(capacity=1, sequences=2))
    assert routing.token_R.tolist() == [1, 2, 0, 3]
    # token 1 is padding: chosen last
    context = Context(capacity=2, real_T=torch.tensor([True, False, True, True]))
    config = MoEConfig(num_experts=2, top_k=1, router="expert_choice")
    assert ROUTERS["expert_choice"](logits_TE, config, context).token_R.tolist() == [2, 3, 0, 3]
    # a capacity of 0 acts as 1
    assert ROUTERS["expert_choice"](logits_TE, config, Context()).token_R.tolist() == [1, 0]
    # at each position, the better of sequences (0, 1) and (2, 3)
    config = MoEConfig(num_experts=2, top_k=1, router="expert_choice_causal", capacity_factor=1.0)
    routing = ROUTERS["expert_choice_causal"](logits_TE, config, Context(sequences=2))
    assert routing.token_R.tolist() == [1, 2, 0, 3]


def test_threshold_keeps_choices_as_often_as_their_gate_says():
    torch.manual_seed(0)
    gates = {0.05: 0.25, 0.15: 0.75, 0.3: 1.0}  # gate of the second choice → share kept at the default .2
    config = MoEConfig(num_experts=3, router="threshold")
    for gate, share in gates.items():
        logits_TE = torch.tensor([math.log(1 - gate), math.log(gate), -30.0]).repeat(4000, 1)
        routing = ROUTERS["threshold"](logits_TE, config, Context(training=True))
        assert routing.count_E[0] == 4000
        assert routing.count_E[1] / 4000 == pytest.approx(share, abs=0.03)
        for eval_threshold, kept in [(None, gate > 0.1), (1.0, False), (0.05, True)]:
            config = MoEConfig(num_experts=3, router="threshold", eval_threshold=eval_threshold)
            routing = ROUTERS["threshold"](logits_TE, config, Context())
            assert routing.count_E.tolist() == [4000, 4000 * kept, 0]
        config = MoEConfig(num_experts=3, router="threshold")


def test_hash_depends_on_the_id_alone_and_spreads():
    config = MoEConfig(num_experts=8, top_k=2, router="hash")
    id_T = torch.arange(8000) % 4000
    context = Context(id_T=id_T, sequences=4)
    routing = ROUTERS["hash"](torch.zeros(8000, 8), config, context)
    chosen = experts_of(routing, 8000)
    assert chosen[:4000] == chosen[4000:]
    assert (routing.count_E / 2000 - 1).abs().max() < 0.1
    # pairs of experts too: 28 of them, each about equally often
    often = torch.tensor([chosen[:4000].count([a, b]) for a in range(8) for b in range(a + 1, 8)])
    assert (often * 28 / 4000 - 1).abs().max() < 0.35
    assert (routing.weight_R == 0.5).all()
    # by position without ids
    routing = ROUTERS["hash"](torch.zeros(12, 8), config, Context(sequences=3))
    chosen = experts_of(routing, 12)
    assert chosen[:4] == chosen[4:8] == chosen[8:]
    assert chosen[:4] == experts_of(ROUTERS["hash"](torch.zeros(4, 8), config, Context(id_T=id_T[:4])), 4)


def test_uniform_is_even_over_real_tokens():
    config = MoEConfig(num_experts=8, top_k=3, router="uniform")
    assert ROUTERS["uniform"](torch.zeros(16, 8), config, Context()).count_E.tolist() == [6] * 8
    layer = MoE(MoEConfig(dim=4, num_experts=8, top_k=3, router="uniform"))
    real = torch.arange(40).reshape(2, 20) % 5 != 2  # 32 real tokens
    _, stats = layer(torch.randn(2, 20, 4), Tokens(real=real))
    assert stats.count_E.tolist() == [12] * 8


def test_quantile_and_sinkhorn_even_out_a_skewed_batch():
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(1024, 16, generator=generator) + torch.linspace(3, -3, 16)
    for router, limit in [("quantile", 1.05), ("sinkhorn", 1.2), ("top_k", 3.0)]:
        config = MoEConfig(num_experts=16, top_k=2, router=router)
        count_E = ROUTERS[router](logits_TE, config, Context(training=True)).count_E.float()
        fullest = (count_E.max() / count_E.mean()).item()
        assert (fullest < limit) == (router != "top_k"), (router, fullest)
