"""The experts of one layer: their weights, stacked. What is done with them is a backend's business.

Shapes: T tokens, D model width, E experts, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_lm.config.model import ModelConfig
from open_lm.moe import backends
from open_lm.moe.routing import Routing


def expert_hidden_dim(config: ModelConfig) -> int:
    """Width F of an expert: --moe-hidden-dim, or 4d for gelu, or the dense SwiGLU's width for swiglu."""
    defaults = {"gelu": 4 * config.dim, "swiglu": config.swiglu_hidden_dim}
    return config.moe.hidden_dim or defaults[config.moe.ffn_type]


class ExpertMLP(nn.Module):
    """E feed-forward networks without biases, each `activate(x w1, x v1) w2`; it only owns their weights.

    w1 (E, D, F), v1 (E, D, F) for swiglu and None for gelu, w2 (E, F, D). Drawn from N(0, .02) as open_lm
    does; `nn.init.initialize_` of a whole model draws them anew.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.moe.num_experts
        E, D, width = config.moe.num_experts, config.dim, expert_hidden_dim(config)
        self.w1 = nn.Parameter(torch.empty(E, D, width))
        self.v1 = nn.Parameter(torch.empty(E, D, width)) if config.moe.ffn_type == "swiglu" else None
        self.w2 = nn.Parameter(torch.empty(E, width, D))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    @staticmethod
    def activate(gate: Tensor, value: Tensor | None) -> Tensor:
        """silu(gate) * value (SwiGLU, 2002.05202), or tanh-GELU(gate) where there is no value; any shape."""
        return F.gelu(gate, approximate="tanh") if value is None else F.silu(gate) * value


class Experts(nn.Module):
    """The experts and one output bias (D,), shared by them all and added once per token, as in MegaBlocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mlp = ExpertMLP(config)
        self.bias = nn.Parameter(torch.zeros(config.dim))
        self.compute = backends.select(config.moe.backend)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """y_TD: for each token the weighted sum of its experts' outputs, plus the bias."""
        y_TD = self.compute(x_TD, routing, self.mlp)
        return y_TD + self.bias.to(y_TD.dtype)
