"""A batch with padding is the batch without it: outputs of real tokens, losses, counts, capacity, gradients.

Shapes: B sequences, S positions, N real tokens, D model width.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE, Tokens


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


ALL = {
    "balance": ("aux", "first_choice", "importance", "global", "sequence"),
    "loss_weight": (0.1, 0.2, 0.3, 0.4, 0.5),
}
LAYERS = {
    "position": {"capacity_factor": 0.7},
    "choice, normalised after drops": {
        "capacity_factor": 0.7, "drop_policy": "choice", "normalize_after_drops": True, "capacity_rounding": "up",
    },
    "probs, a sequence": {"capacity_factor": 0.7, "drop_policy": "probs", "capacity_per": "sequence"},
    "least": {"capacity_factor": 0.2, "min_capacity": 3, "drop_policy": "choice"},
    "sigmoid, groups, bias": {
        "score": "sigmoid", "num_groups": 2, "top_groups": 1, "capacity_factor": 0.8,
        "balance": ("bias", *ALL["balance"]),
    },
    "padded to capacity": {"capacity_factor": 0.7, "pad_to_capacity": True},
    "score after": {"score_order": "after", "capacity_factor": 0.0},
    "shared, residual": {"capacity_factor": 0.9, "shared_hidden_dim": 5, "residual": True},
}  # fmt: skip


def results(layer: MoE, x: torch.Tensor, real: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Outputs of real tokens, statistics and gradients, of an objective of real tokens alone."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, stats = layer(x, None if real is None else Tokens(real=real))
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if real is None else real
    y_ND = y[keep]
    slope_ND = torch.cos(torch.arange(y_ND.numel()).float()).view_as(y_ND)
    ((slope_ND * y_ND).sum() + stats.loss).backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    assert x.grad is not None
    return found | {"y": y_ND.detach(), "x.grad": x.grad[keep]} | stats._asdict()


def make_layer(flags: dict) -> MoE:
    layer = MoE(MoEConfig(dim=8, hidden_dim=6, num_experts=6, z_loss_weight=0.1, **(ALL | flags)))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if layer.router.bias_E is not None:
        layer.router.bias_E.uniform_(-0.2, 0.2)
    return layer


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_with_padding_is_the_batch_without_it(name, training):
    layer = make_layer(LAYERS[name]).train(training)
    x_BSD = torch.randn(3, 10, 8)
    wanted = results(layer, x_BSD, None)
    assert (wanted["dropped"] > 0) == (LAYERS[name]["capacity_factor"] > 0)
    padding_BPD = 5 * torch.randn(3, 6, 8)
    for padded, real in (
        (torch.cat((x_BSD, padding_BPD), dim=1), torch.arange(16) < 10),
        (torch.cat((padding_BPD, x_BSD), dim=1), torch.arange(16) >= 6),
    ):
        found = results(layer, padded, real.expand(3, 16))
        for field, value in wanted.items():
            torch.testing.assert_close(
                found[field], value, atol=1e-5, rtol=1e-5, msg=lambda m, f=field: f"{f}: {m}"
            )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=24, max_size=24), st.sampled_from(["position", "choice", "probs"]))
def test_padding_anywhere(mask, policy):
    torch.manual_seed(1)
    flags = {"balance": ("aux", "first_choice", "importance"), "loss_weight": 0.3, "drop_policy": policy}
    layer = make_layer({"capacity_factor": 0.6} | flags)
    x_BSD, real_BS = torch.randn(3, 8, 8), torch.tensor(mask).view(3, 8)
    found = results(layer, x_BSD, real_BS)
    wanted = results(layer, x_BSD[real_BS][None], None)
    for field in (
        "y",
        "x.grad",
        "loss",
        "count_E",
        "choice_count_E",
        "dropped",
        "tokens",
        "router.layer.weight",
    ):
        torch.testing.assert_close(
            found[field], wanted[field].reshape(found[field].shape), atol=1e-5, rtol=1e-5
        )


def test_a_sequence_of_padding_alone_counts_for_nothing():
    layer = make_layer({"capacity_factor": 0.7, "capacity_per": "sequence"})
    x_BSD = torch.randn(3, 10, 8)
    real_BS = torch.tensor([True, False, True])[:, None].expand(3, 10)
    found, wanted = results(layer, x_BSD, real_BS), results(layer, x_BSD[[0, 2]], None)
    for field, value in wanted.items():
        torch.testing.assert_close(found[field].reshape(value.shape), value, atol=1e-5, rtol=1e-5)
