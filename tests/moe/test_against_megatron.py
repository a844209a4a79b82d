"""Scores, groups, bias, drops and losses against Megatron-core's functions.

What they gave is in peers/megatron.json, written by peers/make_megatron.py.
Shapes: T tokens, B sequences, E experts, R rows.
"""

import json
from pathlib import Path

import pytest
import torch

from open_lm.config.moe import MoEConfig
from open_lm.config.moe_check import check_moe
from open_lm.moe.balance import router_z_loss, update_bias_
from open_lm.moe.capacity import capacity, drop
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context, Routing, expert_of_row
from open_lm.moe.stats import measure, router_loss

FOUND = json.loads(Path(__file__).with_name("peers").joinpath("megatron.json").read_text(encoding="utf-8"))
GOLDEN = json.loads(Path(__file__).with_name("golden_gates.json").read_text(encoding="utf-8"))
GOLDEN_LOGITS_TE = torch.sin(1 + 4 * torch.arange(16.0)[:, None] + torch.arange(4.0))
B = 3


def weights_of(routing: Routing) -> torch.Tensor:
    """weight_TE of the kept rows."""
    T, E = routing.logits_TE.shape
    kept = int(routing.count_E.sum())
    place_R = routing.token_R * E + expert_of_row(routing)
    return torch.zeros(T * E).index_add(0, place_R[:kept], routing.weight_R[:kept]).view(T, E)


def flags_of(options: dict, experts: int, **more) -> MoEConfig:
    """The flags for the arguments of Megatron's topk_routing_with_score_function."""
    k, sigmoid = options["topk"], options.get("score_function") == "sigmoid"
    config = MoEConfig(
        num_experts=experts,
        top_k=k,
        score="sigmoid" if sigmoid else "softmax",
        score_order="before" if sigmoid or options["use_pre_softmax"] else "after",
        normalize_weights=sigmoid and k > 1,
        weight_scale=options.get("scaling_factor") or 1.0,
        num_groups=options.get("num_groups") or 1,
        top_groups=options.get("group_topk") or 1,
        **({"capacity_factor": 0.0} | more),
    )
    check_moe(config)
    return config


@pytest.mark.parametrize("number", range(len(FOUND["routing"])))
def test_routing(number):
    case = FOUND["routing"][number]
    logits_TE = torch.tensor(case["logits"], requires_grad=True)
    bias_E = None if case["bias"] is None else torch.tensor(case["bias"])
    config = flags_of(case["options"], logits_TE.shape[1])
    routing = top_k(logits_TE, config, Context(bias_E=bias_E))
    weight_TE = weights_of(routing)
    torch.testing.assert_close(weight_TE, torch.tensor(case["weight"]), atol=1e-6, rtol=1e-5)
    assert routing.count_E.tolist() == case["count"]
    slope_TE = torch.cos(torch.arange(weight_TE.numel()).float()).view_as(weight_TE)
    (slope_TE * weight_TE).sum().backward()
    torch.testing.assert_close(logits_TE.grad, torch.tensor(case["gradient"]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("balance", ["aux", "sequence"])
@pytest.mark.parametrize("number", range(len(FOUND["routing"])))
def test_balancing_losses_count_without_bias_and_groups(number, balance):
    case = FOUND["routing"][number]
    logits_TE = torch.tensor(case["logits"], requires_grad=True)
    bias_E = None if case["bias"] is None else torch.tensor(case["bias"])
    config = flags_of(case["options"], logits_TE.shape[1], balance=(balance,), loss_weight=1.0)
    context = Context(bias_E=bias_E, sequences=B)
    routing = top_k(logits_TE, config, context)
    loss = router_loss([measure(routing, routing, config, context)], config)
    torch.testing.assert_close(loss, torch.tensor(case[balance]))
    loss.backward()
    gradient_TE = torch.tensor(case[f"{balance}_gradient"])
    torch.testing.assert_close(logits_TE.grad, gradient_TE, atol=1e-6, rtol=1e-5)


def test_balancing_losses_tell_a_sequence_from_a_batch():
    assert all(abs(case["aux"] - case["sequence"]) > 1e-3 for case in FOUND["routing"])


@pytest.mark.parametrize("number", range(len(FOUND["drops"])))
def test_drops(number):
    """By weight, the same rows. By position, only as many of them: see the comment."""
    case = FOUND["drops"][number]
    logits_TE = torch.tensor(case["logits"])
    config = flags_of(
        {"topk": case["k"], "use_pre_softmax": True},
        logits_TE.shape[1],
        capacity_factor=case["factor"],
        capacity_rounding="up",
        drop_policy=case["policy"],
    )
    context = Context(capacity=capacity(len(logits_TE), config))
    routed = top_k(logits_TE, config, context)
    kept = drop(routed, config, context)
    assert 0 < kept.count_E.sum() < routed.count_E.sum()
    kept_TE, theirs_TE = weights_of(kept) > 0, torch.tensor(case["map"]) == 1
    if case["policy"] == "position":
        # Theirs are not the first ones (a top-k of zeros and ones, whose ties fall at random), so that only the
        # experts that drop nothing can be compared; that ours keeps the first is shown against DeepSpeed.
        assert kept.count_E.tolist() == theirs_TE.sum(dim=0).tolist()
        whole_E = kept.count_E == routed.count_E
        assert 0 < whole_E.sum() < len(whole_E)
        assert torch.equal(kept_TE[:, whole_E], theirs_TE[:, whole_E])
        return
    assert torch.equal(kept_TE, theirs_TE)
    torch.testing.assert_close(weights_of(kept), torch.tensor(case["weight"]), atol=1e-6, rtol=1e-5)


def test_capacities():
    for case in FOUND["capacities"]:
        config = MoEConfig(
            num_experts=8,
            top_k=case["k"],
            capacity_factor=case["factor"],
            capacity_rounding="up",
            min_capacity=case["min"],
        )
        # ours is at most the number of tokens, beyond which nothing can be dropped
        assert capacity(case["tokens"], config) == min(case["capacity"], case["tokens"])


def test_z_loss_and_padding():
    case = FOUND["z"]
    logits_TE = torch.tensor(case["logits"], requires_grad=True)
    loss = router_z_loss(logits_TE)
    torch.testing.assert_close(loss, torch.tensor(case["loss"]))
    loss.backward()
    torch.testing.assert_close(logits_TE.grad, torch.tensor(case["gradient"]))
    padded = router_z_loss(logits_TE, ~torch.tensor(case["padding"]))
    torch.testing.assert_close(padded, torch.tensor(case["padded_loss"]))


def test_bias_update_is_theirs_recentred():
    case = FOUND["bias"]
    bias_E, updated_E = torch.tensor(case["bias"]), torch.tensor(case["updated"])
    bias_E -= (mean := bias_E.mean())
    update_bias_(bias_E, torch.tensor(case["count"]), case["rate"])
    # Theirs is not recentred; a constant added to every expert's bias changes no selection.
    assert (updated_E - mean).mean().abs() > 1e-5
    torch.testing.assert_close(bias_E, updated_E - updated_E.mean(), atol=1e-8, rtol=1e-5)


def test_golden_values():
    """Numbers that the systems themselves gave for sin(1 + 4t + e), 16 tokens, 4 experts, top-2."""
    for name, options in {
        "probs_t1_post": {"use_pre_softmax": False},
        "probs_t1_pre": {"use_pre_softmax": True},
        "probs_t1_sigmoid": {"score_function": "sigmoid"},
        "probs_t1_group2_1": {"score_function": "sigmoid", "num_groups": 2, "group_topk": 1},
    }.items():
        weight_TE = weights_of(top_k(GOLDEN_LOGITS_TE, flags_of({"topk": 2} | options, 4), Context()))
        torch.testing.assert_close(weight_TE[1], torch.tensor(GOLDEN[name]), atol=1e-6, rtol=1e-5)

    # its bias is not recorded, but that it chose experts 0 and 2, whose weights do not depend on it
    config = flags_of({"topk": 2, "score_function": "sigmoid"}, 4)
    biased = top_k(GOLDEN_LOGITS_TE, config, Context(bias_E=torch.tensor([1.0, 0, 1, 0])))
    torch.testing.assert_close(
        weights_of(biased)[1], torch.tensor(GOLDEN["probs_t1_sigmoid_bias"]), atol=1e-6, rtol=1e-5
    )

    config = flags_of({"topk": 2, "use_pre_softmax": True}, 4, capacity_factor=1.25, loss_weight=1.0)
    assert capacity(16, config) == GOLDEN["capacity_cf1.25"]
    routing = top_k(GOLDEN_LOGITS_TE, config, Context())
    assert routing.count_E.tolist() == GOLDEN["counts_top2"]
    aux = router_loss([measure(routing, routing, config, Context())], config)
    torch.testing.assert_close(aux, torch.tensor(GOLDEN["mcore_aux_coef1"]))
    torch.testing.assert_close(aux, torch.tensor(GOLDEN["ds_topk2_laux"]))
    torch.testing.assert_close(2 * aux, torch.tensor(GOLDEN["hf_aux"]))
    torch.testing.assert_close(router_z_loss(GOLDEN_LOGITS_TE), torch.tensor(GOLDEN["mcore_z_coef1"]))
    for k in (1, 2):
        config = flags_of({"topk": k, "use_pre_softmax": True}, 4, balance=("first_choice",), loss_weight=1.0)
        routing = top_k(GOLDEN_LOGITS_TE, config, Context())
        first = router_loss([measure(routing, routing, config, Context())], config)
        torch.testing.assert_close(first, torch.tensor(GOLDEN[f"ds_top{k}_laux"]))

    for name, k, flags in (
        ("drop_probs_cf.5_counts", 2, {"drop_policy": "probs"}),
        ("ds_top1_cf.5_dispatch_tokens_per_expert", 1, {"drop_policy": "random"}),
    ):
        config = flags_of(
            {"topk": k, "use_pre_softmax": True}, 4, capacity_factor=0.5, capacity_rounding="up", **flags
        )
        context = Context(capacity=capacity(16, config))
        kept = drop(top_k(GOLDEN_LOGITS_TE, config, context), config, context)
        assert kept.count_E.tolist() == GOLDEN[name]
