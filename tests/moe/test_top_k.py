"""Noise, jitter and the selection of top-k: only in training, with the right odds, never in the weights.

Shapes: T tokens, E experts, K choices per token, D model width.
"""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE
from open_lm.moe.router import Router
from open_lm.moe.routers import top_k
from open_lm.moe.routing import Context, expert_of_row


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def chosen(routing) -> torch.Tensor:
    """expert_TK, best first."""
    return expert_of_row(routing)[routing.row_TK]


def chi_square(found: torch.Tensor, share: torch.Tensor) -> float:
    """sum (found - expected)^2 / expected, over its degrees of freedom."""
    expected = share * found.sum()
    return float(((found - expected).square() / expected).sum() / (found.numel() - 1))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_rsample_chooses_with_the_softmax_probabilities(score):
    T, E = 40_000, 5
    logits_E = torch.tensor([1.0, 0.3, 0.0, -0.5, -1.5])
    config = MoEConfig(num_experts=E, top_k=1, noise="rsample", score=score)
    routing = top_k(logits_E.expand(T, E), config, Context(training=True))
    # 4 degrees of freedom: a value over 4.6 per degree has a chance of .1 %
    assert chi_square(routing.count_E.float(), logits_E.softmax(0)) < 4.6
    assert chi_square(routing.count_E.float(), torch.full((E,), 1 / E)) > 100
    # the weights are without noise
    score_E = logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()
    torch.testing.assert_close(routing.weight_R, score_E[expert_of_row(routing)])


def test_two_samples_are_without_replacement_and_best_first():
    T, E = 40_000, 3
    p_E = torch.tensor([0.6, 0.3, 0.1])
    config = MoEConfig(num_experts=E, top_k=2, noise="rsample")
    expert_TK = chosen(top_k(p_E.log().expand(T, E), config, Context(training=True)))
    pairs = list(permutations(range(E), 2))
    found = torch.tensor([float((expert_TK == torch.tensor(pair)).all(dim=1).sum()) for pair in pairs])
    share = torch.tensor([float(p_E[a] * p_E[b] / (1 - p_E[a])) for a, b in pairs])
    assert chi_square(found, share) < 4.1  # 5 degrees of freedom, .1 %


def test_second_expert_samples_all_but_the_first():
    T, E = 40_000, 4
    p_E = torch.tensor([0.2, 0.5, 0.2, 0.1])
    config = MoEConfig(num_experts=E, top_k=2, noise="second_expert")
    expert_TK = chosen(top_k(p_E.log().expand(T, E), config, Context(training=True)))
    assert (expert_TK[:, 0] == 1).all()
    found = torch.bincount(expert_TK[:, 1], minlength=E).float()[[0, 2, 3]]
    assert chi_square(found, torch.tensor([0.4, 0.4, 0.2])) < 6.9  # 2 degrees of freedom, .1 %


@pytest.mark.parametrize(
    ("flags", "random"),
    [
        ({}, False),
        ({"noise": "rsample"}, True),
        ({"noise": "second_expert"}, True),
        ({"jitter": 0.3}, True),
        ({"drop_policy": "random", "capacity_factor": 0.5}, True),
        ({"drop_policy": "choice", "capacity_factor": 0.5}, False),
    ],
)
def test_chance_belongs_to_training(flags, random):
    layer = MoE(MoEConfig(dim=8, hidden_dim=4, num_experts=4, **({"capacity_factor": 0.0} | flags)))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(64, 8)
    assert torch.equal(layer(x_TD)[0], layer(x_TD)[0]) != random
    layer.eval()
    assert torch.equal(layer(x_TD)[0], layer(x_TD)[0])
    off = {"noise": "none", "jitter": 0.0}
    if "noise" in flags or "jitter" in flags:
        plain = MoE(MoEConfig(dim=8, hidden_dim=4, num_experts=4, capacity_factor=0.0, **off)).eval()
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x_TD)[0], plain(x_TD)[0])


def test_jitter_scales_what_the_router_sees_within_its_bounds():
    D, jitter = 6, 0.1
    router = Router(MoEConfig(dim=D, num_experts=D, jitter=jitter))
    torch.nn.init.eye_(router.layer.weight)
    x_TD = torch.full((5000, D), 2.0)
    factor_TD = router(x_TD).detach() / 2
    assert factor_TD.min() >= 1 - jitter - 1e-6
    assert factor_TD.max() <= 1 + jitter + 1e-6
    # uniform: mean 1, standard deviation jitter / sqrt(3)
    assert abs(factor_TD.mean() - 1) < 5 * jitter / 3**0.5 / factor_TD.numel() ** 0.5
    assert factor_TD.std() == pytest.approx(jitter / 3**0.5, rel=0.02)
    assert torch.equal(router.eval()(x_TD), F.linear(x_TD, router.layer.weight))


def test_experts_see_the_input_without_jitter():
    layer = MoE(MoEConfig(dim=4, hidden_dim=4, num_experts=1, top_k=1, jitter=0.5, capacity_factor=0.0))
    x_TD = torch.randn(16, 4)
    # one expert has the weight 1 whatever the router sees
    assert torch.equal(layer(x_TD)[0], layer.eval()(x_TD)[0])


def test_far_logits_choose_what_they_say_where_the_score_comes_after():
    # a softmax over all experts would give the last three the same 0
    logits_TE = torch.tensor([[400.0, 1.0, 3.0, 2.0], [0.0, -300.0, -200.0, 400.0]])
    config = MoEConfig(num_experts=4, top_k=3, score_order="after")
    assert chosen(top_k(logits_TE, config, Context())).tolist() == [[0, 2, 3], [3, 0, 2]]


def test_losses_count_the_noisy_choice():
    logits_TE = torch.tensor([2.0, 0.0, 0.0, 0.0]).expand(400, 4)
    config = MoEConfig(num_experts=4, top_k=1, noise="rsample")
    routing = top_k(logits_TE, config, Context(training=True))
    assert routing.choice_TK is not None
    assert torch.bincount(routing.choice_TK[:, 0], minlength=4).tolist() == routing.count_E.tolist()
    assert (routing.count_E > 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise": "rsample", "balance": ("bias",)}, "--moe-noise rsample with --moe-balance bias"),
        ({"normalize_after_drops": True, "weight_scale": 2.5}, "--moe-weight-scale 2.5"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        MoE(MoEConfig(dim=4, num_experts=4, **flags))
