"""The experts of one layer: their weights, stacked. What is done with them is a backend's business.

Shapes: T tokens, D model width, E experts, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.moe import MoEConfig
from open_lm.moe import backends
from open_lm.moe.routing import Routing


class Kind(NamedTuple):
    """What happens between an expert's products; call it with x w1 and, if gated, x v1, of any shape."""

    activation: Callable[[Tensor], Tensor]
    gated: bool

    def __call__(self, gate: Tensor, value: Tensor | None) -> Tensor:
        return self.activation(gate) if value is None else self.activation(gate) * value


tanh_gelu = partial(F.gelu, approximate="tanh")

# --moe-ffn-type → kind of expert; the gated ones are those of Shazeer (2002.05202)
EXPERTS: dict[str, Kind] = {
    "gelu": Kind(tanh_gelu, gated=False),
    "gelu_exact": Kind(F.gelu, gated=False),
    "relu": Kind(F.relu, gated=False),
    "relu_squared": Kind(lambda x: F.relu(x).square(), gated=False),
    "silu": Kind(F.silu, gated=False),
    "swiglu": Kind(F.silu, gated=True),
    "geglu": Kind(F.gelu, gated=True),
    "geglu_tanh": Kind(tanh_gelu, gated=True),
    "reglu": Kind(F.relu, gated=True),
    "bilinear": Kind(lambda x: x, gated=True),
}


def expert_hidden_dim(config: MoEConfig) -> int:
    """Width F of an expert: --moe-hidden-dim, or 4d, or for gated ones the dense SwiGLU's width."""
    assert config.dim
    gated = EXPERTS[config.ffn_type].gated
    return config.hidden_dim or (256 * -(-int(8 * config.dim / 3) // 256) if gated else 4 * config.dim)


class ExpertMLP(nn.Module):
    """E feed-forward networks, each `activate(x w1 + b1, x v1 + c1) w2 + b2`; it only owns their weights.

    w1 (E, D, F), v1 (E, D, F) if gated, else None, w2 (E, F, D); b1, c1 (E, F) and b2 (E, D) with
    --moe-expert-bias, else None. Weights are drawn from N(0, .02) as open_lm does; `nn.init.initialize_` of a
    whole model draws them anew.
    """

    def __init__(self, config: MoEConfig):
        super().__init__()
        assert isinstance(config.num_experts, int)
        assert config.dim
        E, D, width = config.num_experts, config.dim, expert_hidden_dim(config)
        self.kind, self.recompute = config.ffn_type, config.recompute
        self.activate = EXPERTS[self.kind]
        gated, biased = self.activate.gated, config.expert_bias
        self.w1 = nn.Parameter(torch.empty(E, D, width))
        self.v1 = nn.Parameter(torch.empty(E, D, width)) if gated else None
        self.w2 = nn.Parameter(torch.empty(E, width, D))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)
        self.b1 = nn.Parameter(torch.zeros(E, width)) if biased else None
        self.c1 = nn.Parameter(torch.zeros(E, width)) if biased and gated else None
        self.b2 = nn.Parameter(torch.zeros(E, D)) if biased else None


class Experts(nn.Module):
    """The experts and one output bias (D,), shared by them all and added once per token, as in MegaBlocks."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        assert config.dim
        self.mlp = ExpertMLP(config)
        self.bias = nn.Parameter(torch.zeros(config.dim)) if config.output_bias else None
        self.compute = backends.select(config.backend)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """y_TD: for each token the weighted sum of its experts' outputs, plus the bias."""
        y_TD = self.compute(x_TD, routing, self.mlp)
        return y_TD if self.bias is None else y_TD + self.bias.to(y_TD.dtype)
