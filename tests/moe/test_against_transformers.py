"""The layer against transformers' MoE blocks with the same weights, live: outputs and all gradients in float32."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from open_lm.config.moe import MoEConfig
from open_lm.moe.layer import MoE

D, WIDTH, E = 24, 20, 12


class Peer(NamedTuple):
    """A block of transformers, and the flags that make ours the same."""

    block: type[nn.Module]
    config: object
    flags: dict


def routed(config, **more):
    """For experts under the names of Qwen and DeepSeek."""
    return config(
        hidden_size=D, moe_intermediate_size=WIDTH, num_experts_per_tok=4, num_attention_heads=2, **more
    )


DEEPSEEK = {"n_routed_experts": E, "n_shared_experts": 2, "routed_scaling_factor": 2.5}

PEERS = {
    "mixtral": Peer(
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=4),
        {"normalize_weights": True},
    ),
    "olmoe": Peer(
        OlmoeSparseMoeBlock,
        OlmoeConfig(hidden_size=D, intermediate_size=WIDTH, num_experts=E, num_experts_per_tok=4),
        {},
    ),
    "granite": Peer(
        GraniteMoeMoE,
        GraniteMoeConfig(hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=4),
        {"score_order": "after"},
    ),
    "qwen3": Peer(
        Qwen3MoeSparseMoeBlock,
        routed(Qwen3MoeConfig, num_experts=E, norm_topk_prob=True),
        {"normalize_weights": True},
    ),
    "qwen2": Peer(
        Qwen2MoeSparseMoeBlock,
        routed(Qwen2MoeConfig, num_experts=E, norm_topk_prob=False, shared_expert_intermediate_size=13),
        {"shared_hidden_dim": 13, "shared_mix": "gate"},
    ),
    "deepseek_v2": Peer(
        DeepseekV2Moe,
        # V2-Lite's choice. V2 itself limits groups by their best score alone, which ours cannot do: it adds up the
        # best k/top_groups, as V3 and Megatron.
        routed(DeepseekV2Config, topk_method="greedy", **DEEPSEEK),
        {"weight_scale": 2.5, "shared_hidden_dim": 2 * WIDTH},
    ),
    "deepseek_v3": Peer(
        DeepseekV3MoE,
        routed(DeepseekV3Config, n_group=4, topk_group=2, norm_topk_prob=True, **DEEPSEEK),
        {
            "score": "sigmoid",
            "normalize_weights": True,
            "num_groups": 4,
            "top_groups": 2,
            "weight_scale": 2.5,
            "shared_hidden_dim": 2 * WIDTH,
            "balance": ("bias",),
        },
    ),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(
    peer: Peer, backend: str = "grouped_mm"
) -> tuple[MoE, nn.Module, list[tuple[nn.Parameter, torch.Tensor]]]:
    """(ours, theirs, pairs): pairs are our parameters and views of theirs that hold the same numbers."""
    peer.config._experts_implementation = "eager"  # type: ignore[attr-defined]
    theirs = peer.block(peer.config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    flags = {"top_k": 4, "capacity_factor": 0.0, "ffn_type": "swiglu", "output_bias": False} | peer.flags
    ours = MoE(MoEConfig(dim=D, num_experts=E, hidden_dim=WIDTH, backend=backend, **flags))
    pairs = matching(ours, theirs, lambda parameter: parameter)
    assert {id(mine) for mine, _ in pairs} == {id(p) for p in ours.parameters()}
    with torch.no_grad():
        for mine, yours in pairs:
            mine.copy_(yours)
        if ours.router.bias_E is not None:
            # Small and positive: then every key is positive, and it does not matter that some versions of
            # transformers give experts outside of the best groups a key of 0, as DeepSeek's own code did, not -inf.
            ours.router.bias_E.uniform_(0, 0.3)
            theirs.gate.e_score_correction_bias.copy_(ours.router.bias_E)
    return ours, theirs, pairs


def matching(ours: MoE, theirs: nn.Module, of) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Our parameters and `of` theirs, transposed as nn.Linear stores them; gate and up are stacked there."""
    mlp, mixing = ours.experts.mlp, ours.mixing
    router = theirs.router if hasattr(theirs, "router") else theirs.gate
    gate_EFD, up_EFD = of(theirs.experts.gate_up_proj).chunk(2, dim=1)
    assert mlp.v1 is not None
    pairs = [
        (ours.router.layer.weight, of(router.weight)),
        (mlp.w1, gate_EFD.transpose(1, 2)),
        (mlp.v1, up_EFD.transpose(1, 2)),
        (mlp.w2, of(theirs.experts.down_proj).transpose(1, 2)),
    ]
    shared = getattr(theirs, "shared_experts", None) or getattr(theirs, "shared_expert", None)
    if shared is not None:
        assert mixing.shared is not None
        assert mixing.shared.v1 is not None
        pairs += [
            (mixing.shared.w1.weight, of(shared.gate_proj.weight)),
            (mixing.shared.v1.weight, of(shared.up_proj.weight)),
            (mixing.shared.w2.weight, of(shared.down_proj.weight)),
        ]
    if mixing.gate is not None:
        pairs.append((mixing.gate.weight, of(theirs.shared_expert_gate.weight)))
    return pairs


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
@pytest.mark.parametrize("name", PEERS)
def test_same_outputs_and_gradients(name, backend):
    ours, theirs, _ = build(PEERS[name], backend)
    x_BSD, slope_BSD = torch.randn(2, 17, D), torch.randn(2, 17, D)
    found = []
    for layer in (ours, theirs):
        x = x_BSD.clone().requires_grad_()
        y = layer(x)[0] if layer is ours else layer(x)
        (y * slope_BSD).sum().backward()
        found.append((y, x.grad))
    for mine, yours in zip(*found, strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
    for mine, gradient in matching(ours, theirs, lambda parameter: parameter.grad):
        torch.testing.assert_close(mine.grad, gradient, atol=1e-5, rtol=1e-5)


def test_groups_and_bias_change_the_choice():
    # without this the comparison above could pass with either left out
    ours, _, _ = build(PEERS["deepseek_v3"])
    x_TD = torch.randn(64, D)
    with_both_E = ours(x_TD)[1].count_E
    assert ours.router.bias_E is not None
    ours.router.bias_E.zero_()
    _, stats = ours(x_TD)
    assert (stats.count_E != with_both_E).any()
    assert (stats.count_E != stats.choice_count_E).any()
