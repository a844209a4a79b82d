"""The layer against transformers' Mixtral and OLMoE blocks with the same weights: outputs and gradients."""

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE

D, WIDTH, E, K = 24, 20, 6, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mixtral() -> torch.nn.Module:
    config = MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config)


def olmoe() -> torch.nn.Module:
    config = OlmoeConfig(
        hidden_size=D, intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False
    )
    config._experts_implementation = "eager"
    return OlmoeSparseMoeBlock(config)


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize(("block", "normalize"), [(mixtral, True), (olmoe, False)], ids=["mixtral", "olmoe"])
def test_same_outputs_and_gradients(block, normalize, backend):
    theirs = block()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=D**-0.5)
    moe = MoEConfig(
        dim=D,
        num_experts=E,
        top_k=K,
        capacity_factor=0.0,
        normalize_weights=normalize,
        ffn_type="swiglu",
        hidden_dim=WIDTH,
        backend=backend,
    )
    ours = MoE(moe)
    mlp = ours.experts.mlp
    assert mlp.v1 is not None
    with torch.no_grad():
        # Theirs: gate and up stacked, (E, 2F, D) and (E, D, F), as nn.Linear stores them.
        gate_EFD, up_EFD = theirs.experts.gate_up_proj.chunk(2, dim=1)
        ours.router.layer.weight.copy_(theirs.gate.weight)
        mlp.w1.copy_(gate_EFD.transpose(1, 2))
        mlp.v1.copy_(up_EFD.transpose(1, 2))
        mlp.w2.copy_(theirs.experts.down_proj.transpose(1, 2))

    x_BSD, weights_BSD = torch.randn(2, 17, D), torch.randn(2, 17, D)
    found = []
    for layer in (ours, theirs):
        x = x_BSD.clone().requires_grad_()
        y = layer(x)[0] if layer is ours else layer(x)
        (y * weights_BSD).sum().backward()
        found.append((y, x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    gate_grad, up_grad = theirs.experts.gate_up_proj.grad.chunk(2, dim=1)
    for gradient, wanted in [
        (ours.router.layer.weight.grad, theirs.gate.weight.grad),
        (mlp.w1.grad, gate_grad.transpose(1, 2)),
        (mlp.v1.grad, up_grad.transpose(1, 2)),
        (mlp.w2.grad, theirs.experts.down_proj.grad.transpose(1, 2)),
    ]:
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)
