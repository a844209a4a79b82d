"""What is added to the routed output, against its formulas; that of PR-MoE against DeepSpeed is in another file.

Shapes: T tokens, D model width.
"""

import pytest
import torch
import torch.nn.functional as F

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE
from open_lm.moe.mixing import MLP, Mixing

D, WIDTH = 6, 5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(**flags) -> Mixing:
    mixing = Mixing(MoEConfig(dim=D, num_experts=4, hidden_dim=WIDTH, top_k=3, **flags))
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter)
    return mixing


def dense(mlp: MLP, x_TD: torch.Tensor) -> torch.Tensor:
    h_TF = F.linear(x_TD, mlp.w1.weight, mlp.w1.bias)
    if mlp.v1 is not None:
        h_TF = F.silu(h_TF) * F.linear(x_TD, mlp.v1.weight, mlp.v1.bias)
    else:
        h_TF = F.gelu(h_TF, approximate="tanh")
    return F.linear(h_TF, mlp.w2.weight, mlp.w2.bias)


def test_nothing_is_added_and_there_are_no_weights_without_flags():
    mixing = make()
    y_TD = torch.randn(7, D)
    assert mixing(torch.randn(7, D), y_TD) is y_TD
    assert not list(mixing.parameters())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ffn_type", ["gelu", "swiglu"])
@pytest.mark.parametrize("mix", ["sum", "olmo", "gate"])
def test_shared_expert(mix, ffn_type, biased):
    mixing = make(shared_hidden_dim=11, shared_mix=mix, ffn_type=ffn_type, expert_bias=biased)
    x_TD, y_TD = torch.randn(7, D), torch.randn(7, D)
    assert mixing.shared is not None
    assert mixing.shared.w1.weight.shape == (11, D)
    shared_TD = dense(mixing.shared, x_TD)
    wanted = {
        "sum": lambda: y_TD + shared_TD,
        "olmo": lambda: (shared_TD + 3 * y_TD) / 4,
        "gate": lambda: y_TD + shared_TD / (1 + torch.exp(-x_TD @ mixing.gate.weight.T)),
    }[mix]()
    torch.testing.assert_close(mixing(x_TD, y_TD), wanted)


@pytest.mark.parametrize("shared", [0, 3])
def test_residual_mlp_after_the_shared_expert(shared):
    mixing = make(residual=True, shared_hidden_dim=shared)
    x_TD, y_TD = torch.randn(7, D), torch.randn(7, D)
    assert mixing.coefficient is not None
    assert mixing.mlp is not None
    assert mixing.mlp.w1.weight.shape == (WIDTH, D)
    routed_TD = y_TD + dense(mixing.shared, x_TD) if shared else y_TD
    odds_T = ((mixing.coefficient.weight[0] - mixing.coefficient.weight[1]) * x_TD).sum(dim=1)
    share_T1 = torch.sigmoid(odds_T + mixing.coefficient.bias[0] - mixing.coefficient.bias[1])[:, None]
    wanted_TD = share_T1 * routed_TD + (1 - share_T1) * dense(mixing.mlp, x_TD)
    torch.testing.assert_close(mixing(x_TD, y_TD), wanted_TD)


@pytest.mark.parametrize("flags", [{"shared_hidden_dim": 3, "shared_mix": "gate"}, {"residual": True}])
def test_a_token_that_every_expert_dropped_still_gets_the_dense_part(flags):
    layer = MoE(MoEConfig(dim=D, num_experts=4, hidden_dim=WIDTH, top_k=1, capacity_factor=0.2, output_bias=False,
                          **flags))  # fmt: skip
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(20, D)
    y_TD, stats = layer(x_TD)
    assert stats.dropped >= 16
    assert (y_TD.abs().sum(dim=1) > 0).all()
    y_TD.sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in layer.mixing.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(dtype):
    mixing = make(residual=True, shared_hidden_dim=3, shared_mix="gate")
    x_TD, y_TD = torch.randn(7, D).to(dtype), torch.randn(7, D).to(dtype)
    for parameter in mixing.parameters():
        parameter.data = (parameter.data / D).to(dtype).float()
    exact_TD = mixing(x_TD.float(), y_TD.float())
    low_TD = mixing.to(dtype)(x_TD, y_TD)
    assert low_TD.dtype == dtype
    error = (low_TD.float() - exact_TD).norm() / exact_TD.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
